"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def lr_scale(step: int, total: int, warmup: int, min_ratio: float) -> float:
    """Factor on the peak learning rate at ``step``: linear warm-up, then half a cosine.

    ``(t+1)/w`` for t < w, then ``r + (1−r)·(1 + cos(π·(t−w)/(T−1−w)))/2``: the peak is reached at the last warm-up
    step and ``r`` at the last step T−1.

    >>> [round(lr_scale(t, 6, 2, 0.1), 3) for t in range(6)]
    [0.5, 1.0, 1.0, 0.775, 0.325, 0.1]

    Args:
        step: t, counted from 0.
        total: T, number of steps of the run.
        warmup: w, number of warm-up steps.
        min_ratio: r, in [0, 1].
    """
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * share))
