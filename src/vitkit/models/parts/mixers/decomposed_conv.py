"""Tokens mixed by 1-D convolutions along the axes of their grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.models.cells import as_cells, as_tokens
from vitkit.models.cross_attention import CrossAttention, attend_from_prefix
from vitkit.models.decomposed_conv import DecompConv
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

# B batch · P prefix tokens · N patches · D width


class DecomposedConv(nn.Module):
    """``Σ_a BN_a(DWConv_a(patches))``: a depthwise convolution of k cells along each axis of the grid, summed.

    Patches see their row and column only, within k // 2 cells; the host's MLP behind it mixes channels. Prefix tokens,
    which have no cell, attend to all tokens by ordinary attention.

    Args:
        k: cells of the kernels, odd. Default 7.
        dims: axes of the grid: 2 for images, 3 for tokens on (t, h, w).

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: BadInput for an even ``k``, a grid of other than ``dims`` axes, or prefix tokens in a host built without;
        ValueError after tokens were merged, dropped or padded.
    Paper: DCFormer: Efficient 3D Vision-Language Modeling with Decomposed Convolutions, arXiv:2502.05091.
    Departs from the paper: as a mixer it has the host's norms, residuals and layer scale around it, and prefix tokens;
        ``dcformer-block`` is the paper's block.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True

    def __init__(self, dim: int, k: int = 7, dims: int = 2, prefix: CrossAttention | None = None) -> None:
        super().__init__()
        self.conv = DecompConv(dim, dim, k, groups=dim, dims=dims)
        self.prefix = prefix

    @classmethod
    def from_standard(
        cls, old: nn.Module | None, spec: PartSpec, warm: bool = True, k: int = 7, dims: int = 2
    ) -> DecomposedConv:
        """An attention has no counterpart in a convolution; ``warm`` starts the attention of prefix tokens from it."""
        prefix = None
        if spec.num_prefix:
            prefix = CrossAttention.like(old if warm else None, spec.dim, spec.num_heads)
        return cls(spec.dim, k, dims, prefix)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        cells = as_cells(x, layout, self.conv.dims, "decomposed-conv", f"give dims={len(layout.grid)}")
        update = as_tokens(self.conv(cells))
        first = attend_from_prefix(self.prefix, x, layout, "decomposed-conv")
        return torch.cat([first.to(update.dtype), update], 1)
