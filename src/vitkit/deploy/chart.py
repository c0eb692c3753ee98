"""The tuner's picture: images a second against what is lost."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitkit.deploy.tuner import Row


def draw(rows: Sequence[Row], chosen: Row, max_drop: float) -> str:
    """SVG text: every measured row a point with its interval, the Pareto front joined, the limit dashed."""
    from matplotlib.figure import Figure

    shown = [r for r in rows if r.fidelity is not None and r.images_per_s]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in shown:
        assert row.fidelity is not None and row.images_per_s is not None
        kept, best = row.status == "ok", row.name == chosen.name
        colour = "#0b6e4f" if best else "#33658a" if kept else "#b0b0b0"
        f = row.fidelity
        error = [[max(0.0, f.drop - f.low)], [max(0.0, f.high - f.drop)]]
        axes.errorbar(row.images_per_s, f.drop, yerr=error, fmt="o", color=colour, ms=8 if best else 5, lw=1)
        axes.annotate(row.name, (row.images_per_s, f.drop), textcoords="offset points", xytext=(6, 4), fontsize=8)
    front = sorted((r for r in shown if r.pareto), key=lambda r: r.images_per_s or 0)
    axes.plot(
        [r.images_per_s or 0 for r in front],
        [r.fidelity.drop if r.fidelity else 0 for r in front],
        color="#33658a",
        lw=0.8,
        alpha=0.6,
    )
    axes.axhline(max_drop, color="#b23a48", ls="--", lw=1)
    axes.set_xlabel("images a second")
    axes.set_ylabel("points lost")
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
