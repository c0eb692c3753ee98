"""GMAR: attention rollout in which each head counts by its gradient."""

from __future__ import annotations

from torch import Tensor, nn

from vitkit.errors import unknown
from vitkit.explain.attention_flow import attention_rollout
from vitkit.explain.base import Explanation


def gmar(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    norm: str = "l1",
    scope: str = "layer",
    discard_ratio: float = 0.0,
    add_residual: bool = True,
    chunk: int = 32,
) -> Explanation:
    """Attention rollout for one class: heads whose attention the class logit reacts to count more.

    With ``G_{l,h} = ∂y_c/∂A_{l,h}``: ``g_{l,h} = Σ|G|`` (l1) or ``√ΣG²`` (l2), ``w = g/Σg``,
    ``Ā_l = Σ_h w_{l,h} A_{l,h}``, ``Â_l = rownorm(Ā_l + I)``, ``R = Â_L … Â_1``, map = class token's row of R.

    One forward and one backward pass for a batch; every image may have another target.

    Args:
        model: a classifier on images in [0, 1] that holds a plain ViT.
        images: (B, C, H, W).
        target: (B,) or one index; None is the predicted class.
        norm: "l1" or "l2".
        scope: "layer" normalises over the heads of a block, so every Ā_l is a weighted mean of attentions; "all" over
            all heads of all blocks (times L), so that blocks with larger gradients weigh more against the skip
            connection.
        discard_ratio, add_residual, chunk: as in :func:`~vitkit.explain.rollout.rollout`.

    Returns: an explanation whose ``meta["head_weights"]`` holds w per block, (B, H) each.
    Raises: as :func:`~vitkit.explain.rollout.rollout`; UnknownName for another norm or scope.

    Paper: GMAR: Gradient-Driven Multi-Head Attention Rollout for Vision Transformer Interpretability,
    arXiv:2504.19414.
    Departs from the paper: it says "normalised across all heads" without saying of what; both readings are scopes.
    Blocks without any gradient use equal weights; models without a class token use the mean over patch rows.
    """
    if norm not in ("l1", "l2"):
        raise unknown("norm", norm, ("l1", "l2"), "vitkit show gmar")
    return attention_rollout(
        model,
        images,
        target,
        head_fusion=f"gmar_{norm}",
        scope=scope,
        discard_ratio=discard_ratio,
        add_residual=add_residual,
        chunk=chunk,
    )
