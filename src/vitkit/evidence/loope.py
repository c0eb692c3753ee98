"""Which position encodings let a ViT answer questions about where things are?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.models.diagnostics.pesi import PESI, pesi
from vitkit.models.diagnostics.three_cell import ThreeCellScore, majority_score, three_cell, three_cell_data
from vitkit.models.parts.positions.loope import LOOPE
from vitkit.testing.worlds import fit_tiny, tiny_vit

CELLS, CELL_PX = 6, 2
NUM_TRAIN, NUM_TEST = 3_000, 800
# chosen on the learned table and a seed that is not among those of the table below
EPOCHS, BATCH, LR = 16, 32, 2e-3
HOST = {"embed_dim": 32, "depth": 2, "num_heads": 4}
ARMS: dict[str, dict[str, Any]] = {
    "no positions": {"pos_embed": "none"},
    "learned table": {},
    "sinusoid, raster order": {"position": (LOOPE, {"order": "raster", "context": False})},
    "sinusoid, Gilbert order": {"position": (LOOPE, {"context": False})},
    "LOOPE": {"position": LOOPE},
}
_NONE, _LEARNED, _STATIC, _LOOPE = "no positions", "learned table", "sinusoid, Gilbert order", "LOOPE"


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Callable[[str, int, int], None] | None = None) -> Evidence:
    """Train a tiny ViT from scratch per encoding and seed on the Three-Cell benchmark.

    Args:
        seeds: of data, weights and batch order.
        progress: called as ``progress("encoding, seed", runs done, runs)``.
    """
    scores: dict[str, list[ThreeCellScore]] = {name: [] for name in ARMS}
    tables: dict[str, list[PESI | None]] = {name: [] for name in ARMS}
    done, total = 0, len(ARMS) * len(seeds)
    for name, options in ARMS.items():
        for seed in seeds:
            if progress is not None:
                progress(f"{name}, seed {seed}", done, total)
            built: list[nn.Module] = []

            def factory(
                seed: int = seed, options: dict[str, Any] = options, built: list[nn.Module] = built, **sizes: Any
            ) -> nn.Module:
                built.append(tiny_vit(seed=seed, **HOST, **sizes, **options))
                return built[-1]

            scores[name].append(
                three_cell(
                    factory, NUM_TRAIN, NUM_TEST, CELLS, CELL_PX, EPOCHS, LR, seed, fit=partial(fit_tiny, batch=BATCH)
                )
            )
            tables[name].append(_pesi(built[-1]))
            done += 1
    means = {name: [score.mean for score in found] for name, found in scores.items()}
    base = [majority_score(three_cell_data(NUM_TRAIN + NUM_TEST, CELLS, 1, s)[1][NUM_TRAIN:]) for s in seeds]
    over_none = {name: paired(means[name], means[_NONE]) for name in ARMS if name != _NONE}
    over_learned = paired(means[_LOOPE], means[_LEARNED])
    # what the image-dependent shift adds to the curve it shifts
    over_static = paired(means[_LOOPE], means[_STATIC])
    rows = [_row("always the more frequent answer", base, [None] * len(seeds))]
    rows += [_row(name, scores[name], tables[name]) for name in ARMS]
    return Evidence(
        claim="On Three-Cell, every position encoding is far above none, and LOOPE is above the learned table.",
        shown=_verdict(list(over_none.values()), over_learned),
        rows=rows,
        notes=(
            "Mean accuracy above no positions: "
            + ", ".join(f"{name} {_interval(found)}" for name, found in over_none.items())
            + f". LOOPE above the learned table: {_interval(over_learned)}; above its own order without the "
            f"shift: {_interval(over_static)}, which the verdict does not ask for. Intervals are 95 % over "
            f"{len(seeds)} seeds, which is few. PESI M_U and M_D are best at 2, A_SU at 0; for LOOPE they are "
            "those of its static order, for the learned table those after training. Rows of the table "
            "are accuracies; area and distance "
            "have base rate 2/3."
        ),
        settings={
            "canvas": f"{CELLS}×{CELLS} cells of {CELL_PX} px (paper: 14×14 of 16 px)",
            "images": f"{NUM_TRAIN} train, {NUM_TEST} test, no placement twice",
            "host": f"D={HOST['embed_dim']}, {HOST['depth']} blocks, {HOST['num_heads']} heads, from scratch",
            "training": f"{EPOCHS} epochs, AdamW {LR}, cosine, batch {BATCH} (paper: 150 epochs, ImageNet start)",
        },
    )


def _pesi(model: nn.Module) -> PESI | None:
    if isinstance(model.position, LOOPE):
        return pesi(model.position.table())
    if model.pos_embed is None:
        return None
    table: torch.Tensor = model.pos_embed[0, model.num_prefix_tokens :].detach()
    return pesi(table.unflatten(0, model.patch_embed.grid_size))


def _row(name: str, scores: list[ThreeCellScore], tables: list[PESI | None]) -> dict[str, Any]:
    row: dict[str, Any] = {"encoding": name}
    for field in ("distance", "area", "orientation", "vector_sum", "mean"):
        row[field] = summarise([getattr(score, field) for score in scores])
    for label, field in (("M_U", "monotonicity"), ("M_D", "directed"), ("A_SU", "asymmetry")):
        values = [getattr(table, field) for table in tables if table is not None]
        row[label] = summarise(values, 2) if values and None not in values else None
    return row


def _verdict(over_none: list[tuple[float, float, float]], over_learned: tuple[float, float, float]) -> bool | None:
    """True when both parts of the claim hold beyond their intervals, False when one is contradicted by its mean."""
    means, lows, _ = zip(*over_none, over_learned)
    if min(lows) > 0:
        return True
    return False if min(means) <= 0 else None


def _interval(found: tuple[float, float, float]) -> str:
    mean, low, high = found
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
