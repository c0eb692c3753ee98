"""Shapes as clouds of points from several domains: train on some of them, test on those left out."""

from __future__ import annotations

import posixpath
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitkit.data.folder import SPLIT_NAMES
from vitkit.data.labels import class_names, natural, some
from vitkit.data.tree import FolderTree
from vitkit.errors import BadInput, unknown

# N clouds · n points · V vertices · T triangles

ENDINGS = (".npy", ".off")
# what holds points too, and would be missed silently
_OTHERS = (".ply", ".obj", ".stl", ".pcd", ".xyz", ".pts", ".npz", ".h5", ".hdf5")
_OFF = re.compile(rb"\s*(?:ST)?C?N?OFF\b(?!\s*BINARY)|\s*OFF(?=\d)")


@dataclass(frozen=True, eq=False)
class PointClouds(Dataset[dict[str, Tensor]]):
    """Labelled clouds in memory; an item is ``{"points", "target", "domain"}``, as objectives take them.

    Attributes:
        points: (N, n, 3) float32, each cloud centred in the unit sphere.
        target: (N,) int64, positions in ``classes``.
        domain: (N,) int64, positions in ``domains``.
        classes, domains: names.
        keys: the file of each cloud, below the root.
    """

    points: Tensor
    target: Tensor
    domain: Tensor
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"points": self.points[i], "target": self.target[i], "domain": self.domain[i]}


@dataclass(frozen=True, eq=False)
class PointDomains:
    """A split by domains.

    Attributes: train: clouds of the source domains; test: those of the domains left out. Domains are numbered from 0 in
    each of them; classes are the same.
    """

    train: PointClouds
    test: PointClouds


def point_domains(
    root: str | Path,
    leave_out: str | Sequence[str],
    *,
    num_points: int = 1024,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> PointDomains:
    """Read ``domain/class/*.npy`` and ``*.off`` below ``root``; some domains are for testing only.

    This is the protocol of PointDA-10 (ModelNet-10, ShapeNet-10, ScanNet-10) and PointDG-3to1 (ModelNet-5, ScanNet-5,
    ShapeNet-5, 3D-FUTURE-Completion-5): one folder per data set, in it one folder per class. Score each domain that was
    left out with :func:`vitkit.pretrain.point_dg.accuracy_by_domain`.

    - ``.npy``: an array (m, 3) or wider, of which the first three columns are taken.
    - ``.off``: a mesh; points are drawn uniformly from its surface, or taken from its vertices if it has no faces.

    Of more than ``num_points`` points that many are drawn, of fewer some are doubled; a file's draw depends on ``seed``
    and its name only. Each cloud is then moved to its mean and scaled into the unit sphere. Class folders may hold
    ``train`` and ``test`` folders: source domains then give their training files, left-out ones their test files.

    Args:
        root: the folder of the domains.
        leave_out: name of the domain to test on, or several.
        num_points: n of every cloud.
        classes: which to read; None: all. Every domain must have every one of them.
        seed: of the draws.
        progress: called as ``progress("read clouds", done, total)``.

    Raises:
        UnknownName: no such domain. BadInput: a file cannot be used (it is named), a domain lacks a class, nothing is
        left to train on, or there are files in formats that are not read.

    Paper: PointDGMamba, arXiv:2408.13574 (PointDG-3to1); PointDAN, arXiv:1911.02744 (PointDA-10).
    Departs from the paper: which points of a mesh or cloud are taken.
    """
    if num_points < 1:
        raise BadInput(f"num_points={num_points} of a cloud must be at least 1.")
    tree = FolderTree(root)
    if not Path(root).is_dir():
        raise BadInput(f"There is no folder {str(root)!r}; give the folder that holds the folders of the domains.")
    files = _files(tree, None if classes is None else tuple(classes))
    domains = sorted(files, key=natural)
    held = (leave_out,) if isinstance(leave_out, str) else tuple(leave_out)
    for name in held:
        if name not in files:
            raise unknown(f"domain of {root}", name, domains, f"ls {root}")
    sources = tuple(d for d in domains if d not in held)
    if not sources or not held:
        raise BadInput(
            f"leave_out={list(held)} leaves {len(sources)} of the {len(domains)} domains of {root} to train on; leave "
            f"out at least one and not all of {', '.join(domains)}."
        )
    names = class_names((c for by_class in files.values() for c in by_class), str(root))
    names = names if classes is None else tuple(classes)
    for domain, by_class in files.items():
        lacking = [c for c in names if c not in by_class]
        if lacking:
            raise BadInput(
                f"The domain {domain!r} of {root} has no clouds of {some([repr(c) for c in lacking])}; add some, or "
                "name the classes that all domains have with classes=[…]."
            )
    train = [(d, c, f) for d in sources for c in names for f in _of(files[d][c], "train")]
    test = [(d, c, f) for d in held for c in names for f in _of(files[d][c], "test")]
    total, done, sets = len(train) + len(test), 0, []
    for chosen, part in ((train, sources), (test, held)):
        clouds = []
        for _, _, path in chosen:
            if progress:
                progress("read clouds", done, total)
            rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
            clouds.append(_read(tree, path, num_points, rng))
            done += 1
        sets.append(
            PointClouds(
                points=torch.from_numpy(np.stack(clouds)),
                target=torch.tensor([names.index(c) for _, c, _ in chosen]),
                domain=torch.tensor([part.index(d) for d, _, _ in chosen]),
                classes=names,
                domains=part,
                keys=tuple(path for _, _, path in chosen),
            )
        )
    return PointDomains(*sets)


def unit_sphere(points: Tensor) -> Tensor:
    """Clouds (…, n, 3) moved to their mean and scaled so that the farthest point lies on the unit sphere.

    A cloud whose points are all one is moved, and not scaled.
    """
    points = points - points.mean(-2, keepdim=True)
    radius = points.square().sum(-1, keepdim=True).amax(-2, keepdim=True).sqrt()
    return points / torch.where(radius > 0, radius, 1.0)


def augment_points(
    points: Tensor,
    axis: int | None = 2,
    scale: tuple[float, float] = (0.8, 1.25),
    jitter: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random turns about the vertical axis, scales and jitter for training, of each cloud on its own.

    Args:
        points: (B, n, 3). axis: the vertical one, 2 for z; None: no turns. scale: lowest and highest, log-uniform.
        jitter: standard deviation of each coordinate; cut at five of them. generator: of the draws.

    Returns: (B, n, 3), new.

    Raises: BadInput for scales or jitter that are not positive, or another axis.
    """
    if axis not in (None, 0, 1, 2) or not 0 < scale[0] <= scale[1] or jitter < 0:
        raise BadInput(
            f"axis={axis} must be 0, 1, 2 or None, scale={scale} two rising positive numbers and jitter={jitter} not "
            "negative."
        )

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=points.device, dtype=points.dtype)

    low, high = np.log(scale)
    size = (low + (high - low) * draw(len(points), 1, 1)).exp()
    angle = 2 * torch.pi * draw(len(points), 1)
    noise = torch.randn(points.shape, generator=generator, device=points.device, dtype=points.dtype).clamp(-5, 5)
    if axis is not None:
        columns = list(points.unbind(2))
        a, b = (axis + 1) % 3, (axis + 2) % 3
        cos, sin = angle.cos(), angle.sin()
        columns[a], columns[b] = cos * columns[a] - sin * columns[b], sin * columns[a] + cos * columns[b]
        points = torch.stack(columns, 2)
    return points * size + jitter * noise


def _files(tree: FolderTree, classes: tuple[str, ...] | None) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """Domain → class → (part, path) of its clouds, in natural order; part is "train", "val", "test" or empty."""
    found: dict[str, dict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(tree.files(), key=natural):
        ending = posixpath.splitext(path)[1].lower()
        folders = path.split("/")[:-1]
        if ending not in ENDINGS and ending not in _OTHERS:
            continue
        if classes is not None and len(folders) > 1 and folders[1] not in classes:
            continue
        if ending in _OTHERS:
            raise BadInput(
                f"{path} of {tree.root} is a {ending} file, which is not read; save its points as an array (m, 3) with "
                "numpy.save, or move it away."
            )
        if len(folders) < 2:
            raise BadInput(
                f"{path} of {tree.root} is in no class folder of a domain; it belongs into domain/class/, such as "
                f"modelnet/chair/{posixpath.basename(path)}."
            )
        part = SPLIT_NAMES.get(folders[2].lower(), "") if len(folders) > 2 else ""
        found[folders[0]][folders[1]].append((part, path))
    if not found:
        raise BadInput(f"{tree.root} holds no clouds ({' or '.join(ENDINGS)}) in folders domain/class/.")
    return found


def _of(files: list[tuple[str, str]], wanted: str) -> list[str]:
    """The files of one class for training or for testing; all of them if the class has no such folder."""
    chosen = [path for part, path in files if part == wanted]
    return chosen or [path for _, path in files]


def _read(tree: FolderTree, path: str, num_points: int, rng: np.random.Generator) -> np.ndarray:
    try:
        data = tree.read(path)
        points = _npy(data) if path.lower().endswith(".npy") else _off(data, num_points, rng)
    except (ValueError, IndexError, OSError, EOFError) as error:
        raise BadInput(f"{path} of {tree.root} cannot be used: {error}. Save it again, or move it away.") from error
    if not len(points) or not np.isfinite(points).all():
        what = "holds no points" if not len(points) else "has coordinates that are NaN or infinite"
        raise BadInput(f"{path} of {tree.root} {what}; repair it, or move it away.")
    if np.ptp(points, axis=0).max() == 0:
        raise BadInput(f"All points of {path} of {tree.root} are at one place; repair it, or move it away.")
    count = len(points)
    if count > num_points:
        points = points[rng.choice(count, num_points, replace=False)]
    elif count < num_points:
        points = np.concatenate([points, points[rng.integers(count, size=num_points - count)]])
    return unit_sphere(torch.from_numpy(points)).float().numpy()


def _npy(data: bytes) -> np.ndarray:
    array = np.load(BytesIO(data), allow_pickle=False)
    if array.ndim != 2 or array.shape[1] < 3 or array.dtype.kind not in "fiu":
        raise ValueError(f"it holds {array.dtype} of shape {array.shape}, not numbers (m, 3)")
    return array[:, :3].astype(np.float64)


def _off(data: bytes, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """Points of the surface (num_points, 3), or the vertices (V, 3) of a file without faces."""
    header = _OFF.match(data)
    if header is None:
        raise ValueError("it does not start like a text file of the Object File Format (OFF)")
    # some files of ModelNet have the counts on the line of the word OFF
    lines = [line.split() for line in re.sub(rb"#[^\n]*", b"", data[header.end() :]).splitlines()]
    lines = [line for line in lines if line]
    if not lines or len(lines[0]) < 2:
        raise ValueError("the numbers of its vertices and faces are missing")
    num_vertices, num_faces = int(lines[0][0]), int(lines[0][1])
    if len(lines) < 1 + num_vertices + num_faces:
        raise ValueError(
            f"it announces {num_vertices} vertices and {num_faces} faces and has {len(lines) - 1} lines for them"
        )
    vertices = np.array([line[:3] for line in lines[1 : 1 + num_vertices]], dtype=np.float64).reshape(-1, 3)
    faces = [line[: 1 + int(line[0])] for line in lines[1 + num_vertices : 1 + num_vertices + num_faces]]
    # a face with more corners is a fan of triangles
    fan = [(face[1], face[i], face[i + 1]) for face in faces for i in range(2, len(face) - 1)]
    triangles = np.array(fan, dtype=np.float64).reshape(-1, 3).astype(np.int64)
    if triangles.size and not 0 <= triangles.min() <= triangles.max() < num_vertices:
        raise ValueError(f"a face has the vertex {triangles.max()} of {num_vertices}")
    corners = vertices[triangles]
    sides = corners[:, 1:] - corners[:, :1]
    area = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1)
    if not area.sum() > 0:
        return vertices
    which = rng.choice(len(area), num_points, p=area / area.sum())
    # the root makes it uniform over a triangle
    s, t = np.sqrt(rng.random(num_points)), rng.random(num_points)
    weights = np.stack([1 - s, s * (1 - t), s * t], 1)
    return (corners[which] * weights[:, :, None]).sum(1)
