"""Two modalities on one grid: each is scanned by what the other finds important, then a gate joins them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.mamba import inner_width
from vitkit.models.ssm import CausalConv, SelectiveSSM, rank_of_step
from vitkit.models.token_line import TokenLine

# B batch · P prefix tokens · N patches · R = P+N rows · M = 2 modalities · K paths · E inner channels


class GatedFusion(nn.Module):
    """``g ⊙ a + (1 − g) ⊙ b`` with ``g = σ(W [a; b])``: for each channel of each token, which of two to believe.

    W starts at zero, and the fusion as the mean.

    Args:
        dim: D.

    Shape: a, b (…, D) → (…, D).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * dim, dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return b + self.gate(torch.cat([a, b], -1)).sigmoid() * (a - b)


class CrossSSM(nn.Module):
    """Tokens of two modalities that choose for each other what to keep, and their gated fusion.

    For modalities a and b with normalised tokens: ``(u, z) = W_in LN(x)`` and, along a path in both directions,
    ``u ← SiLU(conv(u))``, each with weights of its own. Then ``h_t = exp(Δ_t A) h_{t−1} + Δ_t u_t B_t``,
    ``y_t = C_t h_t + D u_t`` where u, Δ, A and D are a's and B and C are computed from b; likewise for b. So b decides
    which of a's tokens enter a's state and what is read from it, but adds no content: if u of a is zero, so is y.
    ``x ← x + W_out (y ⊙ SiLU(z))`` for both, and :class:`GatedFusion` makes one of the two. Linear in N.

    >>> fuse = CrossSSM(16)
    >>> optical, radar = torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    >>> fuse(optical, radar, TokenLayout(grid=(3, 4))).shape
    torch.Size([2, 12, 16])

    Args:
        dim: D of both.
        order: path through the grid, see :func:`~vitkit.models.time_order.time_order`, but not "parallel".
        expand: E/D. d_state: S, states per channel. d_conv: taps of the convolutions.
        dt_rank: R of the steps; None: ⌈D/16⌉.
        prefix: where prefix tokens stand in the path: "first", "middle" or "last".
        grid: (h, w) whose path is kept ready.

    Shape: a, b (B, P+N, D) with one layout → (B, P+N, D). Works on merged, dropped and padded tokens if they are so in
        both.
    Raises: BadInput if a and b have different shapes, the order is parallel, or a size is below 1; UnknownName for
        another order or place.
    Paper: fusion of modalities in Vision Mamba in Remote Sensing, arXiv:2505.00630, as in Sigma, arXiv:2404.04256.
    Departs from the paper: a survey's mechanism class in its plainest form; Sigma exchanges C alone, and its fusion is
        another scan. Both directions, prefix tokens and the gate are ours.
    """

    def __init__(
        self,
        dim: int,
        order: str = "raster",
        expand: float = 2,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        prefix: str = "middle",
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        inner = inner_width(dim, expand)
        self.line = TokenLine((order,), True, prefix, grid)
        if self.line.parallel:
            raise BadInput("CrossSSM has no parallel scan of dates; use sequential or interleave.")
        paths = 2 * self.line.num_paths
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.in_proj = nn.ModuleList(nn.Linear(dim, 2 * inner, bias=False) for _ in range(2))
        self.conv = CausalConv(paths * inner, d_conv)
        self.ssm = SelectiveSSM(inner, paths, d_state, rank_of_step(dim, dt_rank))
        self.out_proj = nn.ModuleList(nn.Linear(inner, dim, bias=False) for _ in range(2))
        self.fuse = GatedFusion(dim)

    def forward(self, a: Tensor, b: Tensor, layout: TokenLayout) -> Tensor:
        first, second = self.updates(a, b, layout)
        return self.fuse(a + first, b + second)

    def updates(self, a: Tensor, b: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """What the exchange adds to a and to b, (B, P+N, D) each: for networks that keep both streams."""
        if a.shape != b.shape or a.ndim != 3:
            raise BadInput(
                f"CrossSSM takes tokens (B, P+N, D) of one shape, not {'×'.join(map(str, a.shape))} and "
                f"{'×'.join(map(str, b.shape))}; bring both modalities to one grid and width first."
            )
        pairs = [proj(norm(x)).chunk(2, -1) for proj, norm, x in zip(self.in_proj, self.norm, (a, b))]
        paths = self.line.paths(layout, len(a), a.device)
        lines = self.line.gather(torch.cat([u for u, _ in pairs], -1), paths)
        still = paths.still
        if still is not None:
            lines = lines.masked_fill(still.unsqueeze(-1), 0)
        # (B, R, K, M·E) → (B, R, M, K, E)
        lines = lines.unflatten(-1, (2, -1)).transpose(2, 3)
        lines = F.silu(self.conv(lines.flatten(2))).view(lines.shape)
        both = None if still is None else still.repeat(1, 1, 2)
        y = self.ssm(lines.flatten(2, 3), both, choice=lines.flip(2).flatten(2, 3)).view(lines.shape)
        y = self.line.restore(y.transpose(2, 3).flatten(3), paths).sum(2)
        first, second = (
            proj(part * F.silu(z)) for proj, part, (_, z) in zip(self.out_proj, y.chunk(2, -1), pairs)
        )  # fmt: skip
        return first, second
