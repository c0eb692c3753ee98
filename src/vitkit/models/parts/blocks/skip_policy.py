"""Blocks without their residual connections, to see which sub-layer needs them."""

from __future__ import annotations

from torch import nn

from vitkit.models.rehost import adopt
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Block


class SkipPolicy(Block):
    """The host's block with ``x ← r_a·x + attn(norm1 x)``, ``x ← r_m·x + mlp(norm2 x)``, r ∈ {0, 1}.

    Without r_a a ViT hardly trains; without r_m it loses little. The weights are the old block's own tensors.

    Args:
        attn: keep the skip connection around attention (r_a).
        mlp: keep the one around the MLP (r_m).

    Paper: Always Skip Attention, arXiv:2505.01996, where the policies none, attn, mlp, all are compared.

    Departs from the paper: nothing.
    """

    slot = "block"
    # with both skips it is the old block; without one it is another function
    preserves = "approx"

    @classmethod
    def from_standard(
        cls, old: nn.Module, spec: PartSpec, warm: bool = True, attn: bool = True, mlp: bool = True
    ) -> SkipPolicy:
        if not isinstance(old, Block):
            raise ValueError(f"A skip policy needs the host's block, but block {spec.depth} is {type(old).__name__}.")
        new = adopt(cls, old)
        new.skip_attn, new.skip_mlp = bool(attn), bool(mlp)
        return new
