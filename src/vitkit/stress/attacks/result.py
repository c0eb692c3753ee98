"""What every attack returns, with the sizes of the change it made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from vitkit.stress.attacks.projection import size


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """Adversarial images and the account of how they came about. All tensors lie on the device of the images.

    Attributes:
        x_adv: (B, C, H, W), float32 (float64 for float64 images), also where the images were half precision: rounding
            would move it out of its ball.
        success: (B,) bool; untargeted: the model no longer predicts the label; targeted: it predicts the target (with
            the demanded confidence, where the attack has one).
        num_iter: (B,) int64, gradient steps taken for the image.
        queries: (B,) int64, forward passes of the image, with or without a backward pass.
        log: (B,) tensors: ``predicted_clean``, ``predicted``, ``confidence`` (softmax probability of ``predicted``),
            ``confidence_label``, ``target`` and ``confidence_target`` (targeted only), ``l2`` and ``linf`` (pixel
            units), ``relative_change`` ‖r‖₂/√(CHW), ``ssim`` in [−1, 1] (NaN below 3 pixels a side), and what the
            attack adds.
    """

    x_adv: Tensor
    success: Tensor
    num_iter: Tensor
    queries: Tensor
    log: dict[str, Tensor] = field(default_factory=dict)


def similarity(x_adv: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each pair, (B,), with the usual Gaussian window of σ = 1.5 (11 pixels).

    The window shrinks on images of fewer than 11 pixels a side. NaN below 3 pixels, where no window fits.
    """
    reach = (min(images.shape[-2:]) - 1) // 2
    if reach < 1:
        return torch.full((len(images),), math.nan, device=images.device)
    # the window reaches ⌊3.5 σ + 0.5⌋ pixels to each side and must leave at least one pixel inside
    value = structural_similarity_index_measure(
        x_adv.float(), images.float(), sigma=min(1.5, reach / 3.5), reduction="none", data_range=1.0
    )
    return torch.as_tensor(value).reshape(-1)


def account(
    *,
    images: Tensor,
    x_adv: Tensor,
    clean: Tensor,
    final: Tensor,
    labels: Tensor,
    target: Tensor | None,
    success: Tensor,
    num_iter: Tensor,
    queries: Tensor,
    **more: Tensor,
) -> AttackResult:
    """Fill in the log from clean and final logits (B, K) and the images."""
    probs = final.softmax(1)
    change = x_adv - images
    l2 = size(change, "l2")
    log = {
        "predicted_clean": clean.argmax(1),
        "predicted": final.argmax(1),
        "confidence": probs.max(1).values,
        "confidence_label": probs.gather(1, labels[:, None])[:, 0],
        "l2": l2,
        "linf": size(change, "linf"),
        "relative_change": l2 / math.sqrt(images[0].numel()),
        "ssim": similarity(x_adv, images),
    }
    if target is not None:
        log["target"] = target
        log["confidence_target"] = probs.gather(1, target[:, None])[:, 0]
    log.update(more)
    return AttackResult(
        x_adv=x_adv.detach(),
        success=success,
        num_iter=num_iter,
        queries=queries,
        log={name: value.detach() for name, value in log.items()},
    )
