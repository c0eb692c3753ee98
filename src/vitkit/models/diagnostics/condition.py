"""How well conditioned the token matrices inside a model are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitkit.anatomy.capture import Trace
from vitkit.anatomy.host import host
from vitkit.anatomy.untouched import untouched

# singular values below this share of the largest are rounding, not data, in a rank-deficient matrix
FLOOR = 1e-6


@dataclass(frozen=True)
class ConditionRow:
    """ln κ at one place of one block: median over images, and how many singular values were counted.

    ``place``: "input" of the block, "attn" (attention branch alone), "attn + skip", "mlp" (MLP branch alone),
    "mlp + skip".
    """

    depth: int
    place: str
    log_kappa: float
    num_values: float


def log_condition(tokens: Tensor, floor: float = FLOOR) -> tuple[Tensor, Tensor]:
    """ln(σ_max/σ_min) of matrices (…, N, D) in float64, over the singular values above ``floor``·σ_max.

    Returns: (…,) ln κ (NaN for a zero matrix) and (…,) how many values were counted.
    """
    sigma = torch.linalg.svdvals(tokens.double())
    top = sigma[..., :1]
    counted = sigma > floor * top
    lowest = torch.where(counted, sigma, torch.full_like(sigma, math.inf)).amin(-1)
    ratio = torch.where(top[..., 0] > 0, top[..., 0] / lowest, torch.full_like(lowest, math.nan))
    return ratio.log(), counted.sum(-1)


@torch.no_grad()
def condition(model: nn.Module, images: Tensor) -> list[ConditionRow]:
    """Median ln κ of the token matrices in every block, on real activations.

    Args:
        model: a host or a wrapper around one; left as found.
        images: (B, C, H, W) in [0, 1].

    Paper: Always Skip Attention, arXiv:2505.01996.
    """
    sites = {
        "input": "resid_pre",
        "attn": "attn.out",
        "attn + skip": "resid_mid",
        "mlp": "mlp.out",
        "mlp + skip": "resid_post",
    }
    vit = host(model)
    with untouched(model), Trace(model, [f"blocks.*.{site}" for site in sites.values()]) as trace:
        model(images)
    rows = []
    for depth, block in enumerate(vit.blocks):
        for place, site in sites.items():
            # without its skip, the stream after the branch is the branch
            if (place == "attn + skip" and not getattr(block, "skip_attn", True)) or (
                place == "mlp + skip" and not getattr(block, "skip_mlp", True)
            ):
                continue
            values, counted = log_condition(trace[f"blocks.{depth}.{site}"])
            rows.append(ConditionRow(depth, place, float(values.nanmedian()), float(counted.double().mean())))
    return rows
