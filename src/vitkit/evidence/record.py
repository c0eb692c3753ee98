"""The record of an experiment, and the statistics its table is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitkit.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a small experiment found out.

    Args:
        claim: the statement of the paper that was put to the test, in one sentence.
        shown: whether its direction appeared; None if the experiment cannot tell (intervals overlap).
        rows: the printed table, one dict a row, all with the same keys in the same order.
        notes: what a reader must know to read the figures rightly.
        settings: data, sizes, epochs and whatever was scaled down against the paper.
    """

    claim: str
    shown: bool | None
    rows: list[dict[str, Any]]
    notes: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.claim.strip() or not self.rows:
            raise BadInput("evidence needs a claim and at least one row of figures.")
        columns = list(self.rows[0])
        for index, row in enumerate(self.rows):
            if list(row) != columns:
                raise BadInput(f"row {index} of the evidence has columns {list(row)}; the first has {columns}.")


def paired(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """How much larger ``a`` is than ``b`` on the same items: mean of ``a − b`` with a bootstrap interval.

    Items (images, or seeds) are drawn with replacement, both values of an item together; low and high are the
    percentiles of the resampled means.

    >>> mean, low, high = paired([0.9, 0.8, 0.7, 0.9], [0.8, 0.7, 0.6, 0.8])
    >>> round(mean, 3), round(low, 3), round(high, 3)
    (0.1, 0.1, 0.1)

    Args:
        a: values (N,), one an item.
        b: values (N,) of the same items in the same order.
        confidence: of the interval, in (0, 1).
        resamples: number of bootstrap draws.
        seed: of the draws.

    Raises: BadInput if the two differ in shape, are empty or not finite, or an option is out of range.
    """
    first, second = _values(a), _values(b)
    if first.shape != second.shape:
        raise BadInput(f"paired values must match: a has {first.size} of them, b has {second.size}.")
    if not 0 < confidence < 1:
        raise BadInput(f"confidence={confidence} must lie strictly between 0 and 1.")
    if resamples < 1:
        raise BadInput(f"resamples={resamples} must be at least 1.")
    difference = first - second
    rng = np.random.default_rng(seed)
    # in slices, so that a hundred thousand images need no gigabytes
    per_slice = max(1, 4_000_000 // len(difference))
    means = np.concatenate(
        [
            difference[rng.integers(len(difference), size=(min(per_slice, resamples - done), len(difference)))].mean(1)
            for done in range(0, resamples, per_slice)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(difference.mean()), float(low), float(high)


def summarise(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± sample standard deviation, as the tables print it; a single value stands alone.

    >>> summarise([0.9, 0.92, 0.94]), summarise([0.5])
    ('0.920 ± 0.020', '0.500')
    """
    table = _values(values)
    mean = f"{table.mean():.{digits}f}"
    return mean if len(table) == 1 else f"{mean} ± {table.std(ddof=1):.{digits}f}"


def _values(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not array.size:
        raise BadInput("no values were given.")
    bad = [i for i, v in enumerate(array) if not math.isfinite(v)]
    if bad:
        raise BadInput(f"{len(bad)} of {array.size} values are NaN or infinite; the first is number {bad[0]}.")
    return array
