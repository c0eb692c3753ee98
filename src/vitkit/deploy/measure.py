"""Times of engines that take turns, so that a slow phase of the machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vitkit.deploy.engines import Runner


@dataclass(frozen=True)
class Timing:
    """Calls of one engine on one batch.

    Attributes:
        ms: median, in milliseconds. p95: 95th percentile.
        ratio: how many times the images a second of the first engine: median over rounds.
        noise: half the interquartile range over the median: how unsteady the machine was.
        rounds: how many calls.
    """

    ms: float
    p95: float
    ratio: float
    noise: float
    rounds: int


def take_turns(
    calls: Mapping[str, tuple[Runner, np.ndarray]], rounds: int = 20, seconds: float = 60.0, warmup: int = 2
) -> dict[str, Timing]:
    """Call every engine once a round: A, B, C, A, B, C, …

    Args:
        calls: name → engine and the images (B, C, H, W) it is given; the first is what ratios refer to.
        rounds: at most so many.
        seconds: no new round begins after this time; there are at least three.
        warmup: calls of each before them.

    Returns: name → :class:`Timing`.
    """
    for runner, images in calls.values():
        for _ in range(warmup):
            runner.run(images)
    until = time.perf_counter() + seconds
    times: list[list[float]] = []
    while len(times) < 3 or (len(times) < rounds and time.perf_counter() < until):
        row = []
        for runner, images in calls.values():
            started = time.perf_counter()
            runner.run(images)
            row.append(time.perf_counter() - started)
        times.append(row)
    table = np.array(times)
    speed = np.array([len(images) for _, images in calls.values()]) / table
    ratios = np.median(speed / speed[:, :1], axis=0)
    found = {}
    for i, name in enumerate(calls):
        column = table[:, i] * 1000
        low, middle, high = np.quantile(column, [0.25, 0.5, 0.75])
        found[name] = Timing(
            ms=float(middle),
            p95=float(np.quantile(column, 0.95)),
            ratio=float(ratios[i]),
            noise=float((high - low) / 2 / middle),
            rounds=len(times),
        )
    return found
