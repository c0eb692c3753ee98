"""Mamba's block as a token mixer: one selective scan through the patches, in linear time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown
from vitkit.models.cross_attention import CrossAttention
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec
from vitkit.models.ssm import CausalConv, SelectiveSSM, rank_of_step
from vitkit.models.token_line import PLACES, TokenLine, apart, in_turn

# B batch · P prefix tokens · N patches · K paths · E = expand · D inner channels

#: where prefix tokens may be
PREFIX = (*PLACES, "attend")


class Mamba(nn.Module):
    """A causal convolution and a selective scan along one path through the patches, with a gate.

    ``(u, z) = W_in x``; along the path ``u ← SiLU(conv(u))``, ``y = SSM(u)``; ``update = W_out (y ⊙ SiLU(z))``. A token
    hears those before it on the path only.

    Args:
        dim: D.
        order: path through the grid, see :func:`~vitkit.models.time_order.time_order`; or "score": by a learned score
            of each token, which also scales what it sends (σ of the score), so that the score learns. On a grid
            (T, h, w) "parallel" gives each date a state of its own, with Δ, B and C from the mean of the dates.
        expand: E/D.
        d_state: S, states per channel.
        d_conv: taps of the convolution.
        dt_rank: R of the steps; None: ⌈D/16⌉.
        prefix: "first", "middle" or "last" in the path, in line with the patches; "attend": outside of it, each prefix
            token takes one attention over all tokens instead. "last" lets the class token hear all patches.
        grid: (h, w) whose path is kept ready.
        num_heads: of the attention for "attend".
        num_prefix: P, so that no attention is made without prefix tokens.

    Shape: (B, P+N, D) → (B, P+N, D). Works on merged, dropped and padded tokens: see
        :class:`~vitkit.models.token_line.TokenLine`.
    Raises: UnknownName for another order or place; BadInput for sizes below 1.
    Paper: Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv:2312.00752; as a vision mixer in
        Vision Mamba in Remote Sensing, arXiv:2505.00630.
    Departs from the paper: the path, prefix tokens and the learned order are vision's and partly ours; norm and
        residual are those of the host's block.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True
    #: walk the path backwards too, with weights of its own
    mirrored = False
    default_prefix = "last"

    def __init__(
        self,
        dim: int,
        order: str = "raster",
        expand: float = 2,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        prefix: str | None = None,
        grid: tuple[int, int] | None = None,
        num_heads: int = 1,
        num_prefix: int = 1,
    ) -> None:
        super().__init__()
        prefix = self.default_prefix if prefix is None else prefix
        inner = inner_width(dim, expand)
        self.line = make_line((("raster" if order == "score" else order),), self.mirrored, prefix, grid)
        self.score = nn.Linear(dim, 1) if order == "score" else None
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = CausalConv(self.line.num_paths * inner, d_conv)
        self.ssm = SelectiveSSM(inner, self.line.num_paths, d_state, rank_of_step(dim, dt_rank))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.attend = CrossAttention(dim, num_heads) if prefix == "attend" and num_prefix else None
        self.joins = prefix != "attend"

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        order: str = "raster",
        expand: float = 2,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        prefix: str | None = None,
    ) -> Mamba:
        """An attention has no counterpart in a scan; ``warm`` starts the attention of ``prefix="attend"`` from it."""
        new = cls(spec.dim, order, expand, d_state, d_conv, dt_rank, prefix, spec.grid, spec.num_heads, spec.num_prefix)
        if warm and new.attend is not None:
            new.attend = CrossAttention.like(old, spec.dim, spec.num_heads)
        return new

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        num_prefix = layout.num_prefix
        rows = x if self.joins else x[:, num_prefix:]
        u, z = self.in_proj(rows).chunk(2, -1)
        count = num_prefix if self.joins else 0
        if self.score is None:
            paths = self.line.paths(layout, x.shape[0], x.device, count)
        else:
            score = self.score(rows)
            u = u * score.sigmoid()
            paths = self.line.by_keys(score[:, count:].detach().float(), count, layout.valid)
        lines = self.line.gather(u, paths)
        if paths.still is not None:
            # padding is silent and at the end of the path, where the convolution's own zeros are
            lines = lines.masked_fill(paths.still.unsqueeze(-1), 0)
        dates = self.line.side_by_side(layout, count)
        lines = apart(lines, dates)
        lines = F.silu(self.conv(lines.flatten(2))).view(lines.shape)
        y = self.line.restore(in_turn(self.ssm(lines, paths.still, dates), dates), paths).sum(2)
        return with_prefix(self.out_proj(y * F.silu(z)), x, layout, self.joins, self.attend)


def inner_width(dim: int, expand: float) -> int:
    """E, at least 1."""
    inner = round(expand * dim)
    if inner < 1:
        raise BadInput(f"expand={expand} leaves no channel of dim={dim}; use 1 or 2.")
    return inner


def make_line(
    orders: tuple[str, ...], mirrored: bool, prefix: str, grid: tuple[int, ...] | None, in_line_only: str = ""
) -> TokenLine:
    """The paths of a mixer whose prefix tokens may stand outside of them.

    ``in_line_only`` names a mixer in which dates cannot walk side by side.
    """
    if prefix not in PREFIX:
        raise unknown("way of prefix tokens", prefix, PREFIX, "vitkit show mamba")
    line = TokenLine(orders, mirrored, "first" if prefix == "attend" else prefix, grid)
    if in_line_only and line.parallel:
        raise BadInput(f"{in_line_only} has no parallel scan of dates; use sequential or interleave, or mamba or vim.")
    return line


def with_prefix(update: Tensor, x: Tensor, layout: TokenLayout, joined: bool, attend: CrossAttention | None) -> Tensor:
    """The update of all rows: that of prefix tokens that stand outside the paths comes from ``attend``."""
    num_prefix = layout.num_prefix
    if joined or not num_prefix:
        return update
    if attend is None:
        raise BadInput(
            f'The mixer was made for a host without prefix tokens and got {num_prefix}; use prefix="middle".'
        )
    mask = layout.key_mask()
    seen = attend(x[:, :num_prefix], x, mask=None if mask is None else mask[:, None, None, :])
    return torch.cat([seen, update], 1)
