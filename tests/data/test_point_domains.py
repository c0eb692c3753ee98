"""Clouds from folders, by domain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import vitkit.data
from vitkit.data.point_domains import augment_points, point_domains, unit_sphere
from vitkit.errors import BadInput, UnknownName

CUBE = """OFF
8 6 0
0 0 0
4 0 0
4 1 0
0 1 0
0 0 1
4 0 1
4 1 1
0 1 1
4 0 1 2 3
4 4 5 6 7
4 0 1 5 4
4 2 3 7 6
4 1 2 6 5
4 0 3 7 4
"""


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for d, domain in enumerate(("modelnet", "scannet", "shapenet")):
        for c, name in enumerate(("bed", "chair")):
            folder = tmp_path / domain / name
            folder.mkdir(parents=True)
            for i in range(3):
                np.save(folder / f"{i}.npy", rng.normal(size=(40 + 10 * i, 3)) * (1 + 5 * d) + 10 * c)
    return tmp_path


def test_one_domain_is_left_out(root):
    (root / "modelnet" / "notes.txt").write_text("no cloud")
    data = point_domains(root, leave_out="scannet", num_points=50)
    assert data.train.domains == ("modelnet", "shapenet") and data.test.domains == ("scannet",)
    assert data.train.classes == data.test.classes == ("bed", "chair")
    assert data.train.points.shape == (12, 50, 3) and data.train.points.dtype == torch.float32
    assert data.train.domain.tolist() == [0] * 6 + [1] * 6 and data.train.target.tolist() == ([0] * 3 + [1] * 3) * 2
    assert data.test.target.tolist() == [0] * 3 + [1] * 3 and data.test.domain.tolist() == [0] * 6
    assert data.test.keys[4] == "scannet/chair/1.npy"
    assert torch.allclose(data.train.points.norm(dim=2).amax(1), torch.ones(12), atol=1e-5)
    assert float(data.train.points.mean(1).abs().max()) < 1e-5
    assert vitkit.data.point_domains is point_domains


def test_several_domains_are_left_out(root):
    data = point_domains(str(root), leave_out=["shapenet", "modelnet"], num_points=8)
    assert data.train.domains == ("scannet",) and data.test.domains == ("shapenet", "modelnet")
    assert data.test.domain.tolist() == [0] * 6 + [1] * 6


def test_items_make_the_batches_of_the_objective(root):
    data = point_domains(root, "scannet", num_points=8)
    batch = next(iter(DataLoader(data.train, batch_size=5)))
    assert {k: tuple(v.shape) for k, v in batch.items()} == {"points": (5, 8, 3), "target": (5,), "domain": (5,)}


def test_points_are_drawn_or_doubled_the_same_way_every_time(root):
    data = point_domains(root, "scannet", num_points=50)
    kept = np.load(root / "modelnet" / "bed" / "1.npy")
    assert torch.allclose(data.train.points[1], unit_sphere(torch.from_numpy(kept)).float(), atol=1e-6)
    few, many = data.train.points[0], data.train.points[2]
    assert len(few.unique(dim=0)) == 40 and len(many.unique(dim=0)) == 50
    seen = []
    again = point_domains(root, "scannet", num_points=50, progress=lambda *args: seen.append(args))
    assert torch.equal(again.train.points, data.train.points)
    assert seen[0] == ("read clouds", 0, 18) and seen[-1] == ("read clouds", 17, 18)
    # other files and another split change nothing about a file
    np.save(root / "modelnet" / "bed" / "0a.npy", np.random.default_rng(1).normal(size=(70, 3)))
    more = point_domains(root, "shapenet", num_points=50)
    assert torch.equal(more.train.points[more.train.keys.index("modelnet/bed/2.npy")], many)
    other = point_domains(root, "shapenet", num_points=50, seed=1)
    assert not torch.equal(other.train.points[3], more.train.points[3])


def test_training_and_test_folders_of_classes(root):
    for domain in ("modelnet", "scannet"):
        for part in ("train", "test"):
            folder = root / domain / "bed" / part
            folder.mkdir()
            np.save(folder / "a.npy", np.eye(3))
    data = point_domains(root, "scannet", num_points=8)
    beds = [k for k in data.train.keys + data.test.keys if "/bed/" in k and "shapenet" not in k]
    assert beds == ["modelnet/bed/train/a.npy", "scannet/bed/test/a.npy"]


def surface(text, root, num_points=4000):
    """The cloud of a mesh, in its own coordinates."""
    (root / "scannet" / "bed" / "mesh.off").write_text(text)
    data = point_domains(root, "scannet", num_points=num_points)
    return data.test.points[data.test.keys.index("scannet/bed/mesh.off")].double()


def test_meshes_are_covered_evenly(root):
    points = surface(CUBE, root)
    points = points - (points.amin(0) + points.amax(0)) / 2
    half = points.amax(0)
    # a box of 4×1×1
    assert torch.allclose(half / half[0], torch.tensor([1.0, 0.25, 0.25]).double(), atol=1e-3)
    ends = (points[:, 0].abs() > 0.999 * half[0]).double().mean()
    assert float(ends) == pytest.approx(2 / 18, abs=0.03)
    sides = (points[:, 1:].abs() > 0.999 * half[1:]).any(1) | (points[:, 0].abs() > 0.999 * half[0])
    assert bool(sides.all())


def test_headers_comments_and_colours_of_meshes(root):
    assert torch.equal(surface(CUBE.replace("OFF\n8", "OFF8"), root), surface(CUBE, root))
    coloured = CUBE.replace("OFF", "COFF # with colours").replace("4 1 1\n", "4 1 1 255 0 0 1\n\n")
    assert torch.equal(surface(coloured, root), surface(CUBE, root))
    only_points = surface("OFF\n4 0 0\n0 0 0\n2 0 0\n0 2 0\n2 2 0\n", root, 4)
    assert torch.allclose(only_points.abs(), torch.tensor([0.5, 0.5, 0.0]).double().sqrt(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.off", b"ply\n", r"bed/x\.off .* does not start"),
        ("x.off", b"OFF BINARY\n", r"does not start"),
        ("x.off", b"OFF\n3 1 0\n0 0 0\n", "announces 3 vertices and 1 faces"),
        ("x.off", b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", "vertex 3 of 3"),
        ("x.off", b"OFF\n1 0 0\n0 zero 0\n", "could not convert"),
        ("x.off", b"OFF\n", "are missing"),
        ("x.npy", b"", r"bed/x\.npy"),
        ("x.npy", b"no array", r"bed/x\.npy"),
        ("x.npy", np.zeros((5, 2)), r"shape \(5, 2\)"),
        ("x.npy", np.zeros((0, 3)), "holds no points"),
        ("x.npy", np.full((5, 3), np.nan), "NaN"),
        ("x.npy", np.ones((5, 3)), "at one place"),
        ("x.npy", np.array([[None] * 3]), "cannot be used"),
        ("x.ply", b"ply\n", r"\.ply file, which is not read"),
    ],
)
def test_bad_files_are_named(root, name, content, match):
    path = root / "scannet" / "bed" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(BadInput, match=match) as caught:
        point_domains(root, "scannet", num_points=8)
    assert f"scannet/bed/{name}" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_folders_are_named(root):
    with pytest.raises(UnknownName, match="scannet"):
        point_domains(root, "scanet")
    with pytest.raises(BadInput, match="0 of the 3 domains"):
        point_domains(root, ["modelnet", "scannet", "shapenet"])
    with pytest.raises(BadInput, match="at least one and not all"):
        point_domains(root, [])
    with pytest.raises(BadInput, match="num_points=0"):
        point_domains(root, "scannet", num_points=0)
    with pytest.raises(BadInput, match="no folder"):
        point_domains(root / "none", "scannet")
    (root / "shapenet" / "sofa").mkdir()
    np.save(root / "shapenet" / "sofa" / "0.npy", np.eye(3))
    with pytest.raises(BadInput, match="'modelnet' .* no clouds of 'sofa'"):
        point_domains(root, "scannet")
    assert point_domains(root, "scannet", classes=["chair", "bed"], num_points=8).train.classes == ("chair", "bed")
    np.save(root / "shapenet" / "lost.npy", np.eye(3))
    with pytest.raises(BadInput, match=r"lost\.npy .* no class folder"):
        point_domains(root, "scannet")
    (root / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no clouds"):
        point_domains(root / "empty", "scannet")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_clouds_are_turned_scaled_and_jittered(axis):
    points = torch.randn(6, 30, 3, generator=torch.Generator().manual_seed(0)).double()
    draw = torch.Generator().manual_seed(1)
    turned = augment_points(points, axis, (1.0, 1.0), 0.0, draw)
    assert torch.allclose(turned[..., axis], points[..., axis])
    assert torch.allclose(torch.cdist(turned, turned), torch.cdist(points, points), atol=1e-5)
    # a proper turn, not a mirror image
    assert torch.allclose(torch.det(turned[:, :3]), torch.det(points[:, :3]))
    assert not torch.allclose(turned, points, atol=0.1)
    scaled = augment_points(points, None, (0.5, 2.0), 0.0, draw) / points
    assert (
        torch.allclose(scaled, scaled[:, :1, :1].expand_as(scaled))
        and 0.5 < float(scaled.min()) < float(scaled.max()) < 2
    )
    noise = augment_points(points, None, (1.0, 1.0), 0.1, draw) - points
    assert float(noise.std()) == pytest.approx(0.1, rel=0.15) and float(noise.abs().max()) <= 0.5 + 1e-9
    with pytest.raises(BadInput, match="axis=3"):
        augment_points(points, 3)
