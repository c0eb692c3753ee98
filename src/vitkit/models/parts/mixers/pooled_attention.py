"""Attention to a coarser copy of the image: keys and values from a pooled grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.cells import as_tokens
from vitkit.models.cross_attention import CrossAttention
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

# B batch · P prefix tokens · N = h·w patches · D width · R = sr


class PooledAttention(nn.Module):
    """Every token attends to the prefix tokens and to ``LN(Conv_{R×R, stride R}(patches))``: N·N/R² products.

    A grid that R does not divide is padded with zeros at its lower and right border. The convolution starts as the mean
    over its cell, so that a swapped host sees a blurred image, not noise. With R = 1 there is no pooling and this is
    full attention.

    Args:
        dim: D. num_heads: H. sr: R, default 2.

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: BadInput for ``sr`` below 1 or a grid that is no plane; ValueError after tokens were merged or dropped.
    Paper: Pyramid Vision Transformer, arXiv:2102.12122; a mechanism of Image Recognition with Online Lightweight Vision
        Transformer: A Survey, arXiv:2505.03113.
    Departs from the paper: prefix tokens are keys that are not pooled; the convolution starts as a mean.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True

    def __init__(self, dim: int, num_heads: int, sr: int = 2) -> None:
        super().__init__()
        if sr < 1:
            raise BadInput(f"pooled-attention: sr={sr} must be at least 1, which is full attention.")
        self.sr = sr
        self.attn = CrossAttention(dim, num_heads)
        self.reduce = nn.Conv2d(dim, dim, sr, stride=sr) if sr > 1 else None
        self.norm = nn.LayerNorm(dim) if sr > 1 else None
        if self.reduce is not None and self.reduce.bias is not None:
            with torch.no_grad():
                self.reduce.weight.copy_(torch.eye(dim)[:, :, None, None].expand_as(self.reduce.weight) / sr**2)
                self.reduce.bias.zero_()

    @classmethod
    def from_standard(cls, old: nn.Module | None, spec: PartSpec, warm: bool = True, sr: int = 2) -> PooledAttention:
        new = cls(spec.dim, spec.num_heads, sr)
        if warm:
            new.attn = CrossAttention.like(old, spec.dim, spec.num_heads)
        return new

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        if self.reduce is None or self.norm is None:
            mask = layout.key_mask()
            bias = None
            if layout.sizes is not None:
                bias = F.pad(layout.sizes.clamp(min=1e-6).log(), (layout.num_prefix, 0))[:, None, None]
            return self.attn(x, x, bias, None if mask is None else mask[:, None, None])
        grid = layout.require_full_grid("Pooled attention")
        if len(grid) != 2:
            raise BadInput(f"Pooled attention is for planes; {'×'.join(map(str, grid))} has {len(grid)} axes.")
        prefix, patches = x[:, : layout.num_prefix], x[:, layout.num_prefix :]
        cells = patches.transpose(1, 2).unflatten(2, grid)
        cells = F.pad(cells, (0, -grid[1] % self.sr, 0, -grid[0] % self.sr))
        pooled = self.norm(as_tokens(self.reduce(cells)))
        return self.attn(x, torch.cat([prefix, pooled], 1))

    def extra_repr(self) -> str:
        return f"sr={self.sr}"
