"""One table of explainers: how faithful, how well placed, how stable, how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.anatomy import untouched
from vitkit.evidence.record import paired
from vitkit.explain.base import Explanation, for_model, resolve_target
from vitkit.explain.faithfulness import common_grid, control_maps, max_sensitivity, score_explainers, sensitivity_n
from vitkit.explain.localization import energy_pointing_game, iou_matched_area, pointing_game


def explanation_bench(
    model: nn.Module,
    explainers: Mapping[str, Callable[..., Explanation]],
    images: Tensor,
    targets: Tensor | None = None,
    masks: Tensor | None = None,
    steps: int = 20,
    draws: int = 5,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Compare explainers on the same images; a random and a centred Gaussian map are always in the table.

    Args:
        model: a classifier on images in [0, 1].
        explainers: name → ``f(model, images, target) -> Explanation``.
        images: (B, C, H, W).
        targets: (B,); None is the predicted class.
        masks: (B, H, W) bool, where the object is; adds the localisation measures.
        steps: of deletion and insertion.
        draws: perturbed images of max-sensitivity.
        progress: called as ``progress(name, done, total)``.

    Returns: one row a map: ``{"explainer": name, "ms_per_image": float or None, measure: (mean, low, high), …}`` with
        95 % bootstrap intervals over images. Max-sensitivity and time are None for the two controls.
    """
    images = for_model(model, images)
    if targets is None:
        with untouched(model), torch.no_grad():
            targets = resolve_target(model(images), None)
    maps: dict[str, Tensor] = {}
    stable: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for done, (name, explain) in enumerate(explainers.items()):
        if progress is not None:
            progress(name, done, len(explainers))
        # the first call pays for allocation and kernel choice
        explain(model, images[:1], targets[:1])
        started = time.perf_counter()
        maps[name] = explain(model, images, targets).map
        # reading one value waits for a device that works ahead
        float(maps[name].sum())
        seconds[name] = time.perf_counter() - started
        stable[name] = max_sensitivity(explain, model, images, targets, draws=draws)
    table = score_explainers(model, images, maps, targets, steps=steps)
    with untouched(model), torch.no_grad():
        grid = common_grid(model, images, maps)
    maps |= control_maps(len(images), grid, images.device)
    rows = []
    for name, measures in table.items():
        values = dict(measures)
        cells = maps[name][0].numel()
        if cells > 1:
            values["sensitivity_n"] = sensitivity_n(model, images, maps[name], targets, n=max(1, cells // 8))
        if masks is not None:
            values["pointing_game"] = pointing_game(maps[name], masks)
            values["energy_pointing_game"] = energy_pointing_game(maps[name], masks)
            values["iou_matched_area"] = iou_matched_area(maps[name], masks)
        row: dict[str, Any] = {
            "explainer": name,
            "ms_per_image": 1000 * seconds[name] / len(images) if name in seconds else None,
            "max_sensitivity": _interval(stable[name]) if name in stable else None,
        }
        rows.append(row | {measure: _interval(v) for measure, v in values.items()})
    return rows


def _interval(values: Tensor) -> tuple[float, float, float]:
    known = values.float().cpu().tolist()
    return paired(known, [0.0] * len(known))
