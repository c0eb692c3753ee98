"""Attention rollout: follow attention through all blocks to the patches."""

from __future__ import annotations

from torch import Tensor, nn

from vitkit.explain.attention_flow import attention_rollout
from vitkit.explain.base import Explanation


def rollout(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    add_residual: bool = True,
    chunk: int = 32,
) -> Explanation:
    """From which patches the output token's content came, by attention alone.

    ``Ā_l`` = attention fused over heads, ``Â_l = rownorm(Ā_l + I)``, ``R = Â_L … Â_1``; the map is the class token's
    row of R on the patches, or the mean over all patch rows of a model that does not read a class token.

    >>> import torch
    >>> from vitkit.models.build import build
    >>> vit = build("vit_femto", img_size=8, in_chans=1, num_classes=3)
    >>> rollout(vit, torch.rand(2, 1, 8, 8)).map.shape
    torch.Size([2, 4, 4])

    Args:
        model: a classifier on images in [0, 1] that holds a plain ViT.
        images: (B, C, H, W).
        target: (B,) or one index; None is the predicted class. Plain fusions give the same map for every class.
        head_fusion: "mean", "max", "min", or weighted by gradients: "gmar_l1", "gmar_l2"
            (see :func:`~vitkit.explain.gmar.gmar`).
        discard_ratio: share of the smallest entries of every ``Ā_l`` that is set to 0, in [0, 1); attention to prefix
            tokens is kept.
        add_residual: add I for the skip connection.
        chunk: images at a time.

    Raises:
        TypeError: the model holds no plain ViT. LookupError: a block has no attention weights.
        BadInput: a block's attention is not between all tokens, or an option is out of range.

    Paper: Abnar & Zuidema, Quantifying Attention Flow in Transformers, arXiv:2005.00928, §3.
    Departs from the paper: other fusions than the mean and ``discard_ratio`` are later practice; merged tokens (ToMe)
    are followed back to the patches they stand for.
    """
    return attention_rollout(
        model,
        images,
        target,
        head_fusion=head_fusion,
        discard_ratio=discard_ratio,
        add_residual=add_residual,
        chunk=chunk,
    )
