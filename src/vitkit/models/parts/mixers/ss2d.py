"""VMamba's cross-scan: the grid is walked along several paths at once, each with its own selective scan."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import unknown
from vitkit.models.cross_attention import CrossAttention
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.mamba import inner_width, make_line, with_prefix
from vitkit.models.scan_order import CROSS
from vitkit.models.spec import PartSpec
from vitkit.models.ssm import SelectiveSSM, rank_of_step
from vitkit.models.token_line import apart, in_turn, on_planes

# B batch · P prefix tokens · N = h·w patches · K paths · E = expand · D inner channels

#: where prefix tokens may be
PREFIX = ("attend", "middle")


class SS2D(nn.Module):
    """A depthwise 3×3 convolution, K selective scans along K paths through the grid, their sum under a gate.

    ``(u, z) = W_in x``, ``u ← SiLU(DWConv(u))``, ``y = Σ_k π_k⁻¹ SSM_k(π_k u)``, ``update = W_out (LN(y) ⊙ SiLU(z))``
    with the paths π_k. The K scans have their own weights and run as one.

    Args:
        dim: D.
        orders: paths, see :func:`~vitkit.models.time_order.time_order`; default rows and columns, forwards and
            backwards. A text is taken apart at its plus signs or commas: "raster+snake_v_rev". On a grid (T, h, w)
            the convolution sees one date at a time; paths may mix "sequential", "interleave" and "joint", or all be
            "parallel": each date has a state of its own, with Δ, B and C from the mean of the dates.
        expand: E/D.
        d_state: S, states per channel.
        dt_rank: R of the steps; None: ⌈D/16⌉.
        prefix: "attend" (default): prefix tokens stand outside of the paths, and each takes one attention over all
            tokens; "middle": in the middle of every path, without the convolution.
        grid: (h, w) whose paths are kept ready.
        num_heads: of the attention for "attend".
        num_prefix: P, so that no attention is made without prefix tokens.

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: UnknownName for another order or place; BadInput for sizes below 1; ValueError after tokens were merged,
        dropped or padded: the convolution needs every cell of the grid.
    Paper: VMamba: Visual State Space Model, arXiv:2401.10166; one of the mechanisms of Vision Mamba in Remote Sensing,
        arXiv:2505.00630.
    Departs from the paper: other paths than its four, several dates, and prefix tokens, which it does not have.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True

    def __init__(
        self,
        dim: int,
        orders: tuple[str, ...] | str = CROSS,
        expand: float = 2,
        d_state: int = 16,
        dt_rank: int | None = None,
        prefix: str = "attend",
        grid: tuple[int, int] | None = None,
        num_heads: int = 1,
        num_prefix: int = 1,
    ) -> None:
        super().__init__()
        if isinstance(orders, str):
            orders = tuple(name.strip() for name in re.split("[+,]", orders) if name.strip())
        if prefix not in PREFIX:
            # at the start of four paths a class token would hear nobody, at their end nobody would hear it
            raise unknown("way of prefix tokens in SS2D", prefix, PREFIX, "vitkit show ss2d")
        inner = inner_width(dim, expand)
        self.line = make_line(tuple(orders), False, prefix, grid)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.dwconv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.ssm = SelectiveSSM(inner, self.line.num_paths, d_state, rank_of_step(dim, dt_rank))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.attend = CrossAttention(dim, num_heads) if prefix == "attend" and num_prefix else None
        self.joins = prefix != "attend"

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        orders: tuple[str, ...] | str = CROSS,
        expand: float = 2,
        d_state: int = 16,
        dt_rank: int | None = None,
        prefix: str = "attend",
    ) -> SS2D:
        """An attention has no counterpart in a scan; ``warm`` starts the attention of prefix tokens from it."""
        new = cls(spec.dim, orders, expand, d_state, dt_rank, prefix, spec.grid, spec.num_heads, spec.num_prefix)
        if warm and new.attend is not None:
            new.attend = CrossAttention.like(old, spec.dim, spec.num_heads)
        return new

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        grid = layout.require_full_grid("SS2D")
        num_prefix = layout.num_prefix
        u, z = self.in_proj(x if self.joins else x[:, num_prefix:]).chunk(2, -1)
        count = num_prefix if self.joins else 0
        cells = on_planes(self.dwconv, u[:, count:], grid)
        y = self.scan(F.silu(torch.cat([u[:, :count], cells], 1) if count else cells), layout, count)
        return with_prefix(self.out_proj(self.norm(y) * F.silu(z)), x, layout, self.joins, self.attend)

    def scan(self, u: Tensor, layout: TokenLayout, num_prefix: int = 0) -> Tensor:
        """The cross-scan alone: inner tokens (B, P+N, E) with ``num_prefix`` prefix rows → their sum over the paths."""
        paths = self.line.paths(layout, u.shape[0], u.device, num_prefix)
        dates = self.line.side_by_side(layout, num_prefix)
        y = self.ssm(apart(self.line.gather(u, paths), dates), common=dates)
        return self.line.restore(in_turn(y, dates), paths).sum(2)
