"""Convolution beside scan: one half of the channels looks at neighbours, the other at the whole image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.ss2d import SS2D
from vitkit.models.scan_order import CROSS
from vitkit.models.spec import PartSpec
from vitkit.models.token_line import on_planes


class ConvSSM(nn.Module):
    """``update = W [conv(x₁); SS2D(x₂)]`` for the two halves x₁, x₂ of the channels.

    The convolution is a depthwise k×k one, GELU and a linear layer; the scan is
    :class:`~vitkit.models.parts.mixers.ss2d.SS2D` on half the width. Prefix tokens have no neighbours: their first half
    goes through the linear layer of the convolution only, their second half is what SS2D makes of it.

    Args:
        dim: D, even.
        kernel: k, odd.
        orders: paths of the scan; default rows and columns, forwards and backwards.
        expand: inner width of the scan over D/2.
        d_state: S, states per channel.
        prefix: of the scan, see SS2D.

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: BadInput for an odd ``dim`` or an even ``kernel``; ValueError after tokens were merged, dropped or padded.
    Paper: the parallel hybrids of Vision Mamba in Remote Sensing, arXiv:2505.00630.
    Departs from the paper: a survey's mechanism class in its plainest form; widths and the linear layers are ours.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True

    def __init__(
        self,
        dim: int,
        kernel: int = 3,
        orders: tuple[str, ...] | str = CROSS,
        expand: float = 2,
        d_state: int = 16,
        prefix: str = "attend",
        grid: tuple[int, int] | None = None,
        num_prefix: int = 1,
    ) -> None:
        super().__init__()
        if dim % 2 or kernel % 2 == 0:
            raise BadInput(
                f"ConvSSM halves the channels and centres its kernel: dim={dim} must be even, {kernel=} odd."
            )
        half = dim // 2
        self.conv = nn.Conv2d(half, half, kernel, padding=kernel // 2, groups=half)
        self.point = nn.Linear(half, half)
        self.scan = SS2D(half, orders, expand, d_state, prefix=prefix, grid=grid, num_prefix=num_prefix)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        kernel: int = 3,
        orders: tuple[str, ...] | str = CROSS,
        expand: float = 2,
        d_state: int = 16,
        prefix: str = "attend",
    ) -> ConvSSM:
        """An attention has no counterpart here, so ``warm`` changes nothing."""
        return cls(spec.dim, kernel, orders, expand, d_state, prefix, spec.grid, spec.num_prefix)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        grid, num_prefix = layout.require_full_grid("ConvSSM"), layout.num_prefix
        near, far = x.chunk(2, -1)
        cells = on_planes(self.conv, near[:, num_prefix:], grid)
        near = self.point(F.gelu(torch.cat([near[:, :num_prefix], cells], 1)))
        return self.proj(torch.cat([near, self.scan(far, layout)], -1))
