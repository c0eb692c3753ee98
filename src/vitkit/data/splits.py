"""Who is trained on, who is tested on: given, stratified, K-fold, group-wise; always seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vitkit.data.source import Source
from vitkit.errors import BadInput


@dataclass(frozen=True)
class Fold:
    """Record numbers of one division of a source, each part sorted (int64)."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def split(
    source: Source,
    test: float = 0.2,
    val: float = 0.1,
    folds: int | None = None,
    group: bool | None = None,
    seed: int = 0,
) -> list[Fold]:
    """Divide a source into training, validation and test parts.

    A division that came with the data is respected, and what it lacks is cut from its training part. Classes keep their
    shares in every part: each class has the whole number below or above its ideal count. Regression targets are
    stratified by tenths, label sets greedily. Images of one group always stay together; with groups the shares are met
    as closely as whole groups allow.

    Args:
        source: the data.
        test: share of all images to test on, in (0, 1). Not used with ``folds`` or a given test part.
        val: share of all images to validate on, in [0, 1); with ``folds`` or a given test part, of those not tested on.
        folds: K ≥ 2 for cross-validation: every image is tested on once.
        group: keep groups together; None: if the records have groups.
        seed: of the draw; equal seeds give equal parts.

    Raises: BadInput for shares that leave nothing to train on, fewer groups or images than parts, ``folds`` on data
        with a test part of its own, or ``group=True`` without groups.
    """
    _check_shares(test, val, folds)
    given = np.array([r.split or "" for r in source.records])
    groups = _groups(source, group)
    rng = np.random.default_rng(seed)
    everything = np.arange(len(source))
    strata = _strata(source)
    if folds is not None:
        if (given == "test").any() or (given == "val").any():
            raise BadInput(
                f"{source.name} comes with a division of its own, so folds={folds} would mix its parts; leave out "
                "folds, or remove the split column or folders."
            )
        parts = _divide(everything, [1 / folds] * folds, strata, groups, rng, source.name)
        result = []
        for part in parts:
            train, validated = _cut(np.setdiff1d(everything, part), val, strata, groups, rng, source.name)
            result.append(_fold(train, validated, part))
        return result
    has_test, has_val = (given == "test").any(), (given == "val").any()
    tested, validated = everything[given == "test"], everything[given == "val"]
    rest = everything[(given != "test") & (given != "val")]
    if has_test and not has_val:
        rest, validated = _cut(rest, val, strata, groups, rng, source.name)
    elif not has_test and has_val:
        rest, tested = _cut(rest, test, strata, groups, rng, source.name)
    elif not has_test:
        rest, validated, tested = _divide(rest, [1 - test - val, val, test], strata, groups, rng, source.name)
    return [_fold(rest, validated, tested)]


def _check_shares(test: float, val: float, folds: int | None) -> None:
    if folds is not None and folds < 2:
        raise BadInput(f"folds={folds} must be at least 2.")
    if not 0 < test < 1 or not 0 <= val < 1 or (folds is None and test + val >= 1):
        raise BadInput(f"test={test} and val={val} are shares: test in (0, 1), val in [0, 1), together below 1.")


def _groups(source: Source, wanted: bool | None) -> np.ndarray | None:
    have = all(r.group is not None for r in source.records)
    if wanted and not have:
        raise BadInput(f"{source.name} has no groups; add a column 'group' to its table, or leave out group=True.")
    if wanted is False or not have:
        return None
    return np.unique([str(r.group) for r in source.records], return_inverse=True)[1].ravel()


def _strata(source: Source) -> np.ndarray:
    """(N,) stratum numbers, or (N, K) of 0/1 where an image belongs to several."""
    labels = source.labels()
    if source.task == "classify":
        return labels
    if source.task == "multilabel":
        # the last column makes images without any label a stratum too
        return np.concatenate([labels, labels.sum(1, keepdims=True) == 0], 1)
    first = labels.reshape(len(labels), -1)[:, 0]
    edges = np.quantile(first, np.linspace(0, 1, 11)[1:-1])
    return np.searchsorted(edges, first, side="right")


def _fold(train: np.ndarray, val: np.ndarray, test: np.ndarray) -> Fold:
    return Fold(*(np.sort(part).astype(np.int64) for part in (train, val, test)))


def _cut(
    rows: np.ndarray,
    share: float,
    strata: np.ndarray,
    groups: np.ndarray | None,
    rng: np.random.Generator,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """(rest, cut) with ``share`` of the rows in the second."""
    if share == 0:
        return rows, rows[:0]
    rest, cut = _divide(rows, [1 - share, share], strata, groups, rng, name)
    return rest, cut


def _divide(
    rows: np.ndarray,
    shares: Sequence[float],
    strata: np.ndarray,
    groups: np.ndarray | None,
    rng: np.random.Generator,
    name: str,
) -> list[np.ndarray]:
    """Disjoint parts of ``rows`` of the given shares, which sum to 1."""
    shares_array = np.asarray(shares, float)
    wanted = int((shares_array > 0).sum())
    have = len(rows) if groups is None else len(np.unique(groups[rows]))
    what = "images" if groups is None else "groups"
    if have < wanted:
        raise BadInput(
            f"{name} has {have} {what} to divide, too few for {wanted} parts; use fewer parts or more images."
        )
    if groups is not None:
        part = _by_group(strata[rows], groups[rows], shares_array, rng)
    elif strata.ndim == 2:
        part = _by_group(strata[rows], np.arange(len(rows)), shares_array, rng)
    else:
        part = _by_class(strata[rows], shares_array, rng)
    parts = [rows[part == i] for i in range(len(shares_array))]
    if any(len(p) == 0 for p, s in zip(parts, shares_array) if s > 0):
        sizes = ", ".join(str(len(p)) for p in parts)
        raise BadInput(
            f"{name} has {len(rows)} images, and the shares {', '.join(f'{s:.3g}' for s in shares_array)} give parts "
            f"of {sizes}; every part needs at least one. Use larger shares, fewer folds or more images."
        )
    return parts


def _by_class(classes: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Part number of each row: in every class the whole numbers next to the ideal, and so in sum.

    Ideal counts are rounded down; what is left of a class goes to the parts that are owed most, counting what rounding
    took from them in the classes before.
    """
    out = np.empty(len(classes), np.int64)
    carried = np.zeros(len(shares))
    largest = int(np.argmax(shares))
    for c in rng.permutation(np.unique(classes)):
        members = rng.permutation(np.flatnonzero(classes == c))
        ideal = shares * len(members)
        counts = np.floor(ideal).astype(np.int64)
        left = len(members) - int(counts.sum())
        # the parts that are owed most take one each; a share of 0 is never owed anything
        owed = np.where(ideal > counts, carried + ideal - counts, -np.inf)
        if counts[largest] == 0 and shares[largest] > shares[shares > 0].min():
            # a class of one or two images is of no use where nothing learns it
            owed[largest] = np.inf
        for p in np.argsort(-owed, kind="stable")[:left]:
            counts[p] += 1
        carried += ideal - counts
        out[members] = np.repeat(np.arange(len(shares)), counts)
    return out


def _by_group(strata: np.ndarray, groups: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Part number of each row, whole groups at a time.

    Groups are placed one by one, those with the largest share of some stratum first, each where it lowers
    ``Σ_pc (n_pc − m_pc)² / m_pc`` most: n_pc images of stratum c in part p so far, m_pc the ideal. Dividing by the
    ideal fills small and large parts at the same pace, and keeps large groups out of small parts.
    """
    table = strata.astype(np.float64) if strata.ndim == 2 else np.eye(int(strata.max()) + 1)[strata]
    # the number of images is one more thing to balance
    table = np.concatenate([table, np.ones((len(table), 1))], 1)
    names, code = np.unique(groups, return_inverse=True)
    code = code.ravel()
    counts = np.zeros((len(names), table.shape[1]))
    np.add.at(counts, code, table)
    totals = counts.sum(0)
    ideal = shares[:, None] * totals
    weight = 1 / np.maximum(ideal, 1e-9)
    have = np.zeros_like(ideal)
    part_of = np.full(len(names), -1)
    order = rng.permutation(len(names))
    importance = (counts / np.maximum(totals, 1)).max(1)
    order = order[np.argsort(-importance[order], kind="stable")]
    allowed = np.flatnonzero(shares > 0)
    for position, g in enumerate(order):
        empty = np.setdiff1d(allowed, part_of) if position >= len(order) - len(allowed) else allowed[:0]
        # the last groups go where there is none yet
        open_parts = empty if len(empty) >= len(order) - position else allowed
        change = ((2 * (have[open_parts] - ideal[open_parts]) + counts[g]) * counts[g] * weight[open_parts]).sum(1)
        best = open_parts[int(np.argmin(change))]
        part_of[g] = best
        have[best] += counts[g]
    return part_of[code]
