"""Mixup and CutMix whose draws are a function of seed and step, so that a resumed run mixes the same images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2


def mix(batch: dict[str, Any], targets: Tensor, mixup: float, cutmix: float, seed: int, step: int) -> dict[str, Any]:
    """Blend each image and its target with its neighbour in the batch.

    Mixup: ``x = λ·x_i + (1−λ)·x_j``; CutMix: a rectangle of area 1−λ of x_i is replaced by x_j's; both
    ``y = λ·y_i + (1−λ)·y_j`` with λ ~ Beta(α, α), one λ a batch. Sample weights are blended like targets.

    Args:
        batch: ``images`` (B, C, H, W), optionally ``weights`` (B,); not changed.
        targets: (B, K) floats: class probabilities, label indicators or values.
        mixup: α of mixup, 0 is off.
        cutmix: α of CutMix, 0 is off; with both on, a fair coin decides.
        seed, step: decide all draws; the global random state is left as it was.

    Returns: a new batch whose ``labels`` are the blended targets.

    Paper: Zhang et al., mixup, arXiv:1710.09412; Yun et al., CutMix, arXiv:1905.04899.
    Departs from the papers: partners are neighbours in the (shuffled) batch instead of a second permutation.
    """
    if not (mixup or cutmix) or len(targets) < 2:
        return batch
    weights = batch.get("weights")
    # torchvision mixes one label tensor; a column more carries the sample weights through the same λ
    columns = targets if weights is None else torch.cat([targets, weights.to(targets)[:, None]], dim=1)
    with torch.random.fork_rng(devices=[]):
        # the multiplier keeps (seed 0, step 1) and (seed 1, step 0) apart
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        use_cutmix = bool(cutmix) and (not mixup or bool(torch.rand(()) < 0.5))
        rule = v2.CutMix(alpha=cutmix) if use_cutmix else v2.MixUp(alpha=mixup)
        images, mixed = rule(batch["images"], columns)
    out = {**batch, "images": images, "labels": mixed[:, : targets.shape[1]]}
    if weights is not None:
        out["weights"] = mixed[:, -1].to(weights)
    return out
