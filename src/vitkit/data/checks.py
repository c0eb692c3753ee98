"""What is wrong with the data, said before anything is trained on it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitkit.data.labels import some
from vitkit.data.look import Looks, Progress
from vitkit.data.source import Skipped, Source
from vitkit.data.splits import Fold
from vitkit.errors import BadInput

#: bits of the perceptual hash in which near-identical images may differ; unrelated ones differ in about 32
NEAR_BITS = 6
# and the small pictures must correlate: the hash alone calls many simple shapes alike. Images below 32 pixels are
# hardly more than shapes, and two different shirts of 28×28 pixels correlate by 0.99
_NEAR_CORRELATION, _NEAR_CORRELATION_TINY = 0.985, 0.999
# above this the pairwise search would take minutes; equal hashes are found all the same
_PAIRWISE_LIMIT = 100_000
_BLOCK = 2048
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Leak:
    """Two images that show the same and lie in different parts.

    Attributes:
        first, second: their keys.
        splits: the parts they lie in.
        distance: bits in which their perceptual hashes differ.
        exact: their content is identical.
    """

    first: str
    second: str
    splits: tuple[str, str]
    distance: int
    exact: bool


@dataclass(frozen=True)
class DataReport:
    """What :func:`check` found.

    Attributes:
        num_images: readable images.
        counts: part → class → images (of the first fold).
        skipped: images that could not be used.
        leakage: identical or near-identical images in different parts.
        constant: keys of images of a single colour.
        sizes: smallest, median and largest (height, width).
        channels: number of channels → images.
        warnings: sentences for people.
    """

    num_images: int
    counts: dict[str, dict[str, int]]
    skipped: tuple[Skipped, ...] = ()
    leakage: tuple[Leak, ...] = ()
    constant: tuple[str, ...] = ()
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    channels: dict[int, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "num_images": self.num_images,
            "counts": self.counts,
            "skipped": [{"path": s.key, "reason": s.reason} for s in self.skipped],
            "leakage": [
                {
                    "first": pair.first,
                    "second": pair.second,
                    "splits": list(pair.splits),
                    "distance": pair.distance,
                    "exact": pair.exact,
                }
                for pair in self.leakage
            ],
            "constant": list(self.constant),
            # sentences, because that is how a report shows them
            "image_sizes": ", ".join(f"{name} {h}×{w}" for name, (h, w) in self.sizes.items()),
            "image_channels": ", ".join(f"{c} ({n} images)" for c, n in self.channels.items()),
            "warnings": list(self.warnings),
        }


def check(source: Source, folds: Sequence[Fold], progress: Progress | None = None, max_pairs: int = 1000) -> DataReport:
    """Say what a careful colleague would notice: leaks between parts, missing classes, odd images.

    Images are the same if their content is; nearly the same if their perceptual hashes (:func:`perceptual_hash`) differ
    in at most 6 of 64 bits and their 16×16 copies correlate above 0.985 (0.999 for images
    below 32 pixels). Nothing is moved or removed.

    Args:
        source: the data.
        folds: its parts, from :func:`vitkit.data.split`.
        progress: called as ``progress(what, done, total)``.
        max_pairs: leaks listed; the warning tells how many there are.

    Raises: BadInput if the training part of a fold has a single class.
    """
    looks = source.looks(progress)
    for number, fold in enumerate(folds):
        _several_classes(source, fold, number, len(folds))
    parts = _parts(len(source), folds)
    counts = {name: _counts(source, getattr(folds[0], name)) for name in _SPLITS if len(getattr(folds[0], name))}
    pairs = _leaks(looks, parts, progress)
    constant = tuple(source.records[i].key for i in np.flatnonzero(looks.constant))
    warnings = _about_classes(source, counts, folds)
    warnings += _about_groups(source, parts)
    warnings += _about_images(source, looks, constant)
    warnings += _about_leaks(source, looks, pairs)
    h, w = looks.sizes[:, 0], looks.sizes[:, 1]
    sizes = {
        "smallest": (int(h.min()), int(w.min())),
        "median": source.image_size,
        "largest": (int(h.max()), int(w.max())),
    }
    return DataReport(
        num_images=len(source),
        counts=counts,
        skipped=tuple(source.skipped),
        leakage=tuple(_leak(source, pair, parts) for pair in pairs[:max_pairs]),
        constant=constant,
        sizes=sizes,
        channels={int(c): int(n) for c, n in zip(*np.unique(looks.chans, return_counts=True))},
        warnings=tuple(warnings),
    )


def _parts(count: int, folds: Sequence[Fold]) -> np.ndarray:
    """(folds, N) part of each image: 0 train, 1 val, 2 test, −1 unused."""
    parts = np.full((len(folds), count), -1, np.int8)
    for row, fold in zip(parts, folds):
        for number, name in enumerate(_SPLITS):
            row[getattr(fold, name)] = number
    return parts


def _counts(source: Source, rows: np.ndarray) -> dict[str, int]:
    if source.task == "regress":
        return {"images": len(rows)}
    labels = source.labels(rows)
    numbers = np.bincount(labels, minlength=source.num_outputs) if source.task == "classify" else labels.sum(0)
    return {c: int(n) for c, n in zip(source.classes, numbers)}


def _several_classes(source: Source, fold: Fold, number: int, total: int) -> None:
    if source.task != "classify":
        return
    present = np.unique(source.labels(fold.train))
    if len(present) < 2:
        which = f"fold {number + 1} of {total}" if total > 1 else "the split"
        only = f"only the class {source.classes[int(present[0])]!r}" if len(present) else "no image"
        raise BadInput(
            f"{source.name}: the training part of {which} has {only}, so nothing can be learned. Use other shares, "
            "fewer folds, or correct the groups or the given split."
        )


# -- leaks -----------------------------------------------------------------------------------------------------------

Pair = tuple[int, int, int, bool]


def _leaks(looks: Looks, parts: np.ndarray, progress: Progress | None) -> list[Pair]:
    """(i, j, distance, exact), nearest first."""
    exact = {(i, j) for i, j in _equal(looks.digests.tobytes(), parts)}
    rows = np.flatnonzero(~looks.constant)
    near = _near(looks, rows, parts, progress)
    found = {(i, j): (i, j, d, False) for i, j, d in near} | {(i, j): (i, j, 0, True) for i, j in exact}
    return sorted(found.values(), key=lambda p: (not p[3], p[2], p[0], p[1]))


def _apart(parts: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """True where two images are used in different parts of some fold."""
    a, b = parts[:, i], parts[:, j]
    return ((a != b) & (a >= 0) & (b >= 0)).any(0)


def _equal(digests: bytes, parts: np.ndarray) -> list[tuple[int, int]]:
    same: dict[bytes, list[int]] = defaultdict(list)
    for i in range(len(digests) // 16):
        same[digests[16 * i : 16 * i + 16]].append(i)
    pairs = []
    for members in same.values():
        # one image repeated a thousand times is one finding, not half a million
        first = members[:32]
        pairs += [(i, j) for n, i in enumerate(first) for j in first[n + 1 :]]
        pairs += [(first[0], j) for j in members[32:]]
    if not pairs:
        return []
    i, j = np.array(pairs).T
    return [pair for pair, apart in zip(pairs, _apart(parts, i, j)) if apart]


def _near(looks: Looks, rows: np.ndarray, parts: np.ndarray, progress: Progress | None) -> list[tuple[int, int, int]]:
    """Pairs in different parts whose hashes differ little and whose small pictures correlate.

    Differing bits of ±1 codes are ``(64 − aᵀb) / 2``, so all pairs are blocks of one matrix product.
    """
    if len(rows) > _PAIRWISE_LIMIT:
        return _same_hash(looks, rows, parts)
    bits = np.unpackbits(looks.hashes[rows].astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)
    codes = bits.astype(np.float32) * 2 - 1
    found: list[tuple[int, int, int]] = []
    for start in range(0, len(rows), _BLOCK):
        for other in range(start, len(rows), _BLOCK):
            distance = (64 - codes[start : start + _BLOCK] @ codes[other : other + _BLOCK].T) / 2
            a, b = np.nonzero(distance <= NEAR_BITS)
            i, j = rows[a + start], rows[b + other]
            keep = i < j
            keep[keep] &= _apart(parts, i[keep], j[keep])
            keep[keep] &= _resemble(looks, i[keep], j[keep])
            found += zip(i[keep].tolist(), j[keep].tolist(), distance[a[keep], b[keep]].astype(int).tolist())
        if progress is not None:
            progress("compare images", min(start + _BLOCK, len(rows)), len(rows))
    return found


def _same_hash(looks: Looks, rows: np.ndarray, parts: np.ndarray) -> list[tuple[int, int, int]]:
    """For very large sources: neighbours in the order of their hashes that have the same one."""
    order = rows[np.argsort(looks.hashes[rows], kind="stable")]
    i, j = np.minimum(order[:-1], order[1:]), np.maximum(order[:-1], order[1:])
    keep = looks.hashes[i] == looks.hashes[j]
    keep[keep] &= _apart(parts, i[keep], j[keep])
    keep[keep] &= _resemble(looks, i[keep], j[keep])
    return [(a, b, 0) for a, b in zip(i[keep].tolist(), j[keep].tolist())]


def _resemble(looks: Looks, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    result = np.zeros(len(i), bool)
    thumbs = looks.thumbs
    tiny = looks.sizes.min(1) < 32
    least = np.where(tiny[i] | tiny[j], _NEAR_CORRELATION_TINY, _NEAR_CORRELATION)
    # in pieces: a candidate pair costs two small pictures
    for start in range(0, len(i), 65536):
        a = thumbs[i[start : start + 65536]].reshape(-1, thumbs[0].size).astype(np.float32)
        b = thumbs[j[start : start + 65536]].reshape(-1, thumbs[0].size).astype(np.float32)
        a -= a.mean(1, keepdims=True)
        b -= b.mean(1, keepdims=True)
        scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
        result[start : start + 65536] = (a * b).sum(1) > least[start : start + 65536] * scale
    return result


def _leak(source: Source, pair: Pair, parts: np.ndarray) -> Leak:
    i, j, distance, exact = pair
    a, b = parts[:, i], parts[:, j]
    fold = int(np.flatnonzero((a != b) & (a >= 0) & (b >= 0))[0])
    where = (_SPLITS[int(a[fold])], _SPLITS[int(b[fold])])
    return Leak(source.records[i].key, source.records[j].key, where, distance, exact)


# -- sentences -------------------------------------------------------------------------------------------------------


def _about_classes(source: Source, counts: dict[str, dict[str, int]], folds: Sequence[Fold]) -> list[str]:
    if source.task == "regress":
        return []
    found = []
    for name, numbers in counts.items():
        absent = [repr(c) for c, n in numbers.items() if n == 0]
        if absent:
            found.append(f"The {name} part has no image of {some(absent)}.")
    if source.task == "classify":
        alone = [i + 1 for i, f in enumerate(folds) if len(np.unique(source.labels(f.test))) == 1]
        if alone:
            found.append(
                f"The test part of fold {some([str(i) for i in alone])} has a single class; AUROC has no meaning there."
            )
        present = [n for n in counts["train"].values() if n]
        if max(present) >= 10 * min(present):
            found.append(
                f"Classes are unequal: the training part has from {min(present)} to {max(present)} images of a class; "
                "look at macro-F1 beside accuracy."
            )
    return found


def _about_groups(source: Source, parts: np.ndarray) -> list[str]:
    groups = [r.group for r in source.records]
    if not all(g is not None for g in groups):
        return []
    names, code = np.unique([str(g) for g in groups], return_inverse=True)
    crossing: set[str] = set()
    for row in parts:
        used = row >= 0
        seen = np.unique(np.stack([code.ravel()[used], row[used]], 1), axis=0)
        several = np.flatnonzero(np.bincount(seen[:, 0], minlength=len(names)) > 1)
        crossing |= {str(names[i]) for i in several}
    if not crossing:
        return []
    return [
        f"{len(crossing)} groups lie in more than one part, such as {some(sorted(crossing), 3)}: results are too good."
    ]


def _about_images(source: Source, looks: Looks, constant: Sequence[str]) -> list[str]:
    found = []
    if source.skipped:
        reason, times = Counter(s.reason for s in source.skipped).most_common(1)[0]
        often = f" ({times} of them: {reason})" if times > 1 else ""
        found.append(
            f"{len(source.skipped)} of {len(source) + len(source.skipped)} images could not be used and were "
            f"skipped{often}."
        )
    if constant:
        found.append(f"{len(constant)} images are of a single colour: {some(constant, 3)}.")
    if len(np.unique(looks.chans)) > 1:
        found.append(f"Grey and colour images are mixed; all are read with {source.in_chans} channels.")
    if len(np.unique(looks.kinds)) > 1:
        found.append("Images of 8 bits and of more are mixed; each is scaled by the range of its own type.")
    return found


def _about_leaks(source: Source, looks: Looks, pairs: Sequence[Pair]) -> list[str]:
    found = []
    if pairs:
        exact = sum(p[3] for p in pairs)
        several = "1 pair" if len(pairs) == 1 else f"{len(pairs)} pairs"
        found.append(
            f"{several} of images in different parts are the same ({exact}) or nearly so ({len(pairs) - exact}); "
            "results on them say nothing about new images."
        )
    same: dict[bytes, int] = {}
    clashes = []
    content = looks.digests.tobytes()
    for i, record in enumerate(source.records):
        first = same.setdefault(content[16 * i : 16 * i + 16], i)
        if source.records[first].label != record.label:
            clashes.append(f"{source.records[first].key} and {record.key}")
    if clashes:
        found.append(f"{len(clashes)} identical images have different labels: {some(clashes, 3)}.")
    if len(source) > _PAIRWISE_LIMIT:
        found.append(f"With more than {_PAIRWISE_LIMIT:,} images only equal perceptual hashes were compared.")
    return found
