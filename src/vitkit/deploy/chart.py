"""The tuner's picture: what each candidate gains and loses."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitkit.deploy.tuner import Row

_CHOSEN, _KEPT, _OTHER, _LIMIT = "#0b6e4f", "#33658a", "#b0b0b0", "#b23a48"


def draw(rows: Sequence[Row], chosen: Row, max_drop: float) -> str:
    """SVG text: a line for every measured row, images a second beside points lost with their interval.

    Grey rows were not kept; a star marks the Pareto front, the dashed line the limit.
    """
    from matplotlib.figure import Figure

    shown = sorted((r for r in rows if r.fidelity and r.images_per_s), key=lambda r: r.images_per_s or 0)
    figure = Figure(figsize=(8, 1.1 + 0.26 * len(shown)), layout="constrained")
    speed, loss = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(shown):
        assert row.fidelity is not None and row.images_per_s is not None
        colour = _CHOSEN if row.name == chosen.name else _KEPT if row.status == "ok" else _OTHER
        speed.barh(place, row.images_per_s, color=colour)
        f = row.fidelity
        error = [[max(0.0, f.drop - f.low)], [max(0.0, f.high - f.drop)]]
        loss.errorbar(f.drop, place, xerr=error, fmt="o", color=colour, ms=4, lw=1.2)
    speed.set_yticks(range(len(shown)), [r.name + (" ★" if r.pareto else "") for r in shown], fontsize=8)
    speed.set_xlabel("images a second")
    loss.axvline(0, color="#888888", lw=0.8)
    loss.axvline(max_drop, color=_LIMIT, ls="--", lw=1)
    loss.set_xlabel("points lost")
    for axes in (speed, loss):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
