"""Images in arrays: ``.npz`` archives and the IDX files of MNIST."""

from __future__ import annotations

import gzip
import posixpath
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitkit.data.decode import channels_first
from vitkit.data.labels import NOT_LABELLED, Label, Unknown, looks_continuous, natural, settle, some, unlabelled
from vitkit.data.look import digest
from vitkit.data.source import Record, Skipped, Split, Task
from vitkit.data.tree import Tree
from vitkit.errors import BadInput

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
# one pair of names per habit: Keras, MedMNIST, plain
_KEYS = {split: ((f"x_{split}", f"y_{split}"), (f"{split}_images", f"{split}_labels")) for split in _SPLITS}
_ALL = (("x", "y"), ("images", "labels"), ("X", "Y"), ("X", "y"), ("data", "labels"), ("data", "target"))

_IDX_IMAGES = re.compile(r"(?:^|/)(?P<stem>[^/]*)-?images[-.]idx3-ubyte(?P<gz>\.gz)?$")
_IDX_TYPES = {0x08: np.uint8, 0x09: np.int8, 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class ArrayPixels:
    """Pixels that are in memory already.

    Args:
        blocks: arrays (N, H, W, C), one after the other.
    """

    decodes = False

    def __init__(self, blocks: Sequence[np.ndarray]) -> None:
        self.blocks = list(blocks)
        self.starts = np.cumsum([0, *(len(b) for b in self.blocks)])

    def load(self, where: int, at_least: tuple[int, int] | None = None) -> tuple[np.ndarray, tuple[int, int]]:
        block = int(np.searchsorted(self.starts, where, side="right")) - 1
        array = self.blocks[block][where - self.starts[block]]
        return array, array.shape[:2]

    def look(self, where: int) -> tuple[np.ndarray, tuple[int, int], bytes]:
        array, size = self.load(where)
        return array, size, digest(np.ascontiguousarray(array).tobytes())


@dataclass
class ArrayListing:
    """Blocks of images, and the labels of those that have one; ``where`` counts over all blocks."""

    blocks: list[np.ndarray]
    records: list[Record]
    where: np.ndarray
    classes: tuple[str, ...]
    task: Task
    skipped: list[Skipped]


def list_npz(path: str | Path, task: Task | None = None, unknown: Unknown | None = None) -> ArrayListing:
    """Images and labels of an ``.npz``: ``x_train, y_train[, x_val, y_val], x_test, y_test[, classes]`` or ``x, y``.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W); labels (N,), (N, 1), one-hot or 0/1 (N, K), or numbers.

    Raises: BadInput for other keys, Python objects (pickles), shapes that do not fit together, NaN, a damaged file.
    """
    name = Path(path).name
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise BadInput(f"{name} is a single array; an .npz with images and labels (keys x and y) is needed.")
            arrays = {key: _plain(archive, key, name) for key in archive.files}
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise BadInput(f"{name} cannot be read ({error}); it is damaged or no .npz. Save or copy it again.") from error
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        # numpy reports both text files and bare pickles this way
        raise BadInput(f"{name} is no .npz archive of plain arrays; make one with np.savez(path, x=…, y=…).") from error
    pairs = _pairs(arrays, name)
    names = arrays.get("classes", arrays.get("class_names"))
    given = None if names is None else tuple(str(c) for c in names.ravel())
    return list_arrays(pairs, name, given, task, arrays.get("group", arrays.get("groups")), unknown)


def _plain(archive: np.lib.npyio.NpzFile, key: str, name: str) -> np.ndarray:
    try:
        return archive[key]
    except ValueError as error:
        if "pickle" not in str(error) and "Object arrays" not in str(error):
            raise
        raise BadInput(
            f"{name}: {key!r} holds Python objects (a pickle), which can run code and is refused. Save it as numbers "
            f"or text, such as np.array({key}, dtype=np.uint8) or dtype=str."
        ) from error


def _pairs(arrays: dict[str, np.ndarray], name: str) -> list[tuple[Split | None, str, np.ndarray, np.ndarray]]:
    found: list[tuple[Split | None, str, np.ndarray, np.ndarray]] = []
    for split in _SPLITS:
        for x, y in _KEYS[split]:
            if x in arrays and y not in arrays:
                raise BadInput(f"{name} has {x!r} but not its labels {y!r}; it has {', '.join(arrays)}.")
            if x in arrays:
                found.append((split, x, arrays[x], arrays[y]))
                break
    if not found:
        plain = [(x, y) for x, y in _ALL if x in arrays and y in arrays][:1]
        found += [(None, x, arrays[x], arrays[y]) for x, y in plain]
    if not found:
        raise BadInput(
            f"{name} has the keys {', '.join(arrays) or '(none)'}; x_train, y_train, x_test, y_test or x, y (or "
            "images, labels) are needed."
        )
    return found


def list_arrays(
    pairs: Sequence[tuple[Split | None, str, np.ndarray, np.ndarray]],
    name: str,
    classes: tuple[str, ...] | None = None,
    task: Task | None = None,
    group: np.ndarray | None = None,
    unknown: Unknown | None = None,
) -> ArrayListing:
    """Records for (split, key, images, labels) arrays. Raises: BadInput, naming key and rows."""
    blocks, labels, keys, splits = [], [], [], []
    for split, key, x, y in pairs:
        blocks.append(_images(x, key, name))
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if y.ndim not in (1, 2) or len(y) != len(x):
            raise BadInput(f"{name}: {key!r} has {len(x)} images, its labels have the shape {y.shape}.")
        labels.append(y)
        keys += [f"{key}[{i}]" for i in range(len(x))]
        splits += [split] * len(x)
    if len({b.shape[-1] for b in blocks}) > 1:
        raise BadInput(f"{name}: the arrays have different numbers of channels ({[b.shape for b in blocks]}).")
    if len({y.ndim for y in labels}) > 1 or len({y.shape[1:] for y in labels}) > 1:
        raise BadInput(f"{name}: the label arrays have different shapes ({[y.shape for y in labels]}).")
    if not keys:
        raise BadInput(f"{name} holds no images.")
    y, reasons = _known(np.concatenate(labels), keys, name, task, unknown)
    where = np.array([i for i in range(len(keys)) if i not in reasons], np.int64)
    if not len(where):
        raise BadInput(f"{name}: no image has a label that is known.")
    values, names, kind = _labels(y[where], [keys[i] for i in where], name, classes, task)
    if group is not None and len(group) != len(keys):
        raise BadInput(f"{name}: {len(group)} groups for {len(keys)} images.")
    groups = [None] * len(keys) if group is None else [str(g) for g in group]
    records = [Record(keys[i], v, groups[i], splits[i]) for i, v in zip(where, values)]
    skipped = [Skipped(keys[i], reason) for i, reason in sorted(reasons.items())]
    return ArrayListing(blocks, records, where, names, kind, skipped)


def _images(x: np.ndarray, key: str, name: str) -> np.ndarray:
    if x.dtype.kind not in "biuf":
        raise BadInput(f"{name}: {key!r} holds {x.dtype}, not pixel values.")
    if x.ndim == 4 and channels_first(x.shape):
        x = np.moveaxis(x, 1, -1)
    elif x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise BadInput(f"{name}: {key!r} has the shape {x.shape}; (N, H, W), (N, H, W, C) or (N, C, H, W) are images.")
    if x.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(1))
        if len(bad):
            rows = some([str(i) for i in bad])
            raise BadInput(
                f"{name}: {key!r} has NaN or infinite pixels in image {rows}. Leave these images out, or fill the gaps "
                "(np.nan_to_num) if that is right for your data."
            )
        return x.astype(np.float32, copy=False)
    if x.dtype == np.bool_:
        return x.astype(np.uint8) * 255
    if x.dtype not in (np.uint8, np.uint16) and x.size and x.min() >= 0 and 1 < x.max() <= 255:
        # pixel values that went through a list or a table come back as int64
        return x.astype(np.uint8)
    return x if x.dtype in (np.uint8, np.uint16) else x.astype(np.float32)


def _known(
    y: np.ndarray, keys: Sequence[str], name: str, task: Task | None, unknown: Unknown | None
) -> tuple[np.ndarray, dict[int, str]]:
    """Labels with every −1 settled, and position → reason of the images to leave out because theirs is not known."""
    if y.dtype.kind not in "biufUS":
        raise BadInput(f"{name}: labels of type {y.dtype} are neither numbers nor text.")
    rows = y.reshape(len(y), -1)
    if y.dtype.kind in "US":
        missing, how = (rows == np.zeros((), rows.dtype)).any(1), "missing"
    else:
        missing, how = ~np.isfinite(rows).all(1), "missing (NaN or infinite)"
    if missing.any() and unknown != "skip":
        shown = some([keys[i] for i in np.flatnonzero(missing)])
        raise BadInput(f'{name}: the label is {how} for {shown}. unknown="skip" leaves these images out.')
    reasons = {int(i): f"its label is {how}" for i in np.flatnonzero(missing)}
    if y.dtype.kind in "biuf" and task != "regress":
        good = rows[~missing]
        if y.ndim == 2 and len(good) and np.isin(good, (-1, 0, 1)).all():
            settled, out = settle(rows, unknown, name, keys)
            return settled, {**reasons, **{int(i): "some of its labels are −1" for i in np.flatnonzero(out)}}
        if y.ndim == 1 and unlabelled(np.unique(good).tolist(), unknown, name):
            reasons |= {int(i): NOT_LABELLED for i in np.flatnonzero(y == -1)}
    return y, reasons


def _labels(
    y: np.ndarray, keys: Sequence[str], name: str, classes: tuple[str, ...] | None, task: Task | None
) -> tuple[list[Label], tuple[str, ...], Task]:
    if y.dtype.kind in "US":
        y = y.astype(np.str_)
    if y.ndim == 2:
        return _matrix(y, name, classes, task)
    if task is None:
        task = "regress" if y.dtype.kind == "f" and looks_continuous([str(v) for v in np.unique(y)]) else "classify"
    if task == "multilabel":
        raise BadInput(f'{name}: task="multilabel" needs labels of shape (N, K) with 0 and 1; they are {y.shape}.')
    if task == "regress":
        try:
            return [float(v) for v in y], ("target",), "regress"
        except ValueError as error:
            raise BadInput(f'{name}: task="regress" needs numbers as labels ({error}).') from error
    if y.dtype.kind in "US":
        found = tuple(sorted(set(y.tolist()), key=natural))
        names = classes if classes is not None and set(found) <= set(classes) else found
        number = {c: i for i, c in enumerate(names)}
        return [number[v] for v in y.tolist()], names, "classify"
    return _numbered(y, keys, name, classes)


def _numbered(
    y: np.ndarray, keys: Sequence[str], name: str, classes: tuple[str, ...] | None
) -> tuple[list[Label], tuple[str, ...], Task]:
    if (y != np.round(y)).any():
        raise BadInput(
            f'{name}: task="classify" needs whole numbers as labels; some have decimals. Did you mean regress?'
        )
    whole = y.astype(np.int64)
    if classes is None:
        # class numbers with gaps, or from 1, become 0…K−1; the names keep the numbers as given
        present, codes = np.unique(whole, return_inverse=True)
        return list(codes.ravel().tolist()), tuple(str(c) for c in present), "classify"
    wrong = np.flatnonzero((whole < 0) | (whole >= len(classes)))
    if len(wrong):
        shown = some([f"{keys[i]} ({whole[i]})" for i in wrong])
        raise BadInput(f"{name}: labels go from 0 to {len(classes) - 1} ({len(classes)} class names); not so: {shown}.")
    return whole.tolist(), classes, "classify"


def _matrix(
    y: np.ndarray, name: str, classes: tuple[str, ...] | None, task: Task | None
) -> tuple[list[Label], tuple[str, ...], Task]:
    if y.dtype.kind in "US":
        raise BadInput(f"{name}: labels of shape {y.shape} must be numbers.")
    names = classes if classes is not None and len(classes) == y.shape[1] else tuple(str(i) for i in range(y.shape[1]))
    binary = bool(np.isin(y, (0, 1)).all())
    if task is None:
        one_hot = binary and bool((y.sum(1) == 1).all())
        task = "classify" if one_hot else "multilabel" if binary else "regress"
    if task == "regress":
        return [tuple(float(v) for v in row) for row in y], names, task
    if not binary:
        raise BadInput(f"{name}: labels of shape {y.shape} must be 0 or 1 for task={task!r}.")
    if task == "multilabel":
        return [tuple(float(v) for v in row) for row in y], names, task
    if not (y.sum(1) == 1).all():
        raise BadInput(f'{name}: some images have no class or several; use task="multilabel".')
    return y.argmax(1).tolist(), names, task


# -- IDX -------------------------------------------------------------------------------------------------------------


def find_idx(tree: Tree) -> list[tuple[Split | None, str, str]]:
    """(split, images, labels) paths of IDX pairs in a tree; empty if there are none.

    Raises: BadInput for images without their labels.
    """
    files = tree.files()
    found: list[tuple[Split | None, str, str]] = []
    for path in sorted(files, key=natural):
        match = _IDX_IMAGES.search(path)
        if match is None:
            continue
        stem = match["stem"].rstrip("-").lower()
        split: Split | None = "test" if stem in ("t10k", "test") else "val" if stem == "val" else "train"
        wanted = path.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
        labels = next((p for p in (wanted, wanted + ".gz") if p in files), None)
        if labels is None:
            raise BadInput(f"{posixpath.join(tree.root, path)} has no labels beside it ({posixpath.basename(wanted)}).")
        found.append((split, path, labels))
    if len(found) == 1:
        found = [(None, *found[0][1:])]
    return found


def list_idx(
    tree: Tree,
    found: Sequence[tuple[Split | None, str, str]],
    task: Task | None = None,
    unknown: Unknown | None = None,
) -> ArrayListing:
    """Images and labels of IDX files. Raises: BadInput, naming the file."""
    pairs = [
        (split, posixpath.basename(x), read_idx(tree.read(x), x), read_idx(tree.read(y), y)) for split, x, y in found
    ]
    return list_arrays(pairs, Path(tree.root).name, None, task, unknown=unknown)


def read_idx(data: bytes, name: str) -> np.ndarray:
    """The array of an IDX file (type and shape in the header, big-endian), gzipped or not.

    Raises: BadInput if header and content do not agree.
    """
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise BadInput(f"{name} is damaged ({error}); download it again.") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise BadInput(f"{name} is no IDX file (it does not begin with an IDX header).")
    kind = np.dtype(_IDX_TYPES[data[2]])
    start = 4 + 4 * data[3]
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist())
    expected = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    if len(shape) != data[3] or len(data) - start != expected:
        raise BadInput(f"{name} has {len(data) - start} bytes of content where its header says {expected}: truncated?")
    return np.frombuffer(data, kind, offset=start).reshape(shape).astype(kind.newbyteorder("="))
