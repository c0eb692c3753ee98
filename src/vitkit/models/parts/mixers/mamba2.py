"""Mamba-2's block as a token mixer: one decay per head, so that the scan is a sum of small masked attentions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.cross_attention import CrossAttention
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.mamba import inner_width, make_line, with_prefix
from vitkit.models.scan import ssd_scan
from vitkit.models.spec import PartSpec
from vitkit.models.ssm import CausalConv, start_of_steps

# B batch · P prefix tokens · N patches · K paths · H heads · C channels of a head · E = H·C · G groups · S states


class GatedRMSNorm(nn.Module):
    """``RMSNorm(y ⊙ SiLU(z)) ⊙ w``, over each group of channels on its own.

    Args:
        dim: E. groups: G, divides E. eps: added to the mean square.

    Shape: y, z (…, E) → (…, E) in the dtype of y; computed in float32 at least.
    Paper: Transformers are SSMs (Mamba-2), arXiv:2405.21060, §7.1.
    """

    def __init__(self, dim: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gated = y.to(torch.promote_types(y.dtype, torch.float32)) * F.silu(z)
        gated = gated.unflatten(-1, (self.groups, -1))
        gated = gated * (gated.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (gated.flatten(-2) * self.weight).to(y.dtype)


class Mamba2(nn.Module):
    """State-space duality along one path through the patches, with heads and a gated norm.

    ``(z, u, B, C, δ) = W_in x``; along the path ``(u, B, C) ← SiLU(conv(u, B, C))``, ``Δ = softplus(δ + b)`` for each
    head, ``h_t = exp(Δ_t A) h_{t−1} + Δ_t u_t B_tᵀ`` with one number A < 0 for each head, ``y_t = h_t C_t + D u_t``;
    ``update = W_out RMSNorm(y ⊙ SiLU(z))``. Against :class:`~vitkit.models.parts.mixers.mamba.Mamba`: Δ, B and C come
    from the token itself, before the convolution, and many states cost little.

    Args:
        dim: D.
        order: path through the grid, see :func:`~vitkit.models.time_order.time_order`.
        bidirectional: walk the path backwards too, with a convolution, A, D and steps of its own; the projections and
            the gate are shared, and the two are summed.
        expand: E/D.
        d_state: S, states per channel.
        head_dim: C, channels of a head, divides E; None: the largest divisor of E up to 64.
        groups: G, heads of a group share B and C; divides the number of heads.
        d_conv: taps of the convolution.
        chunk: steps that are one masked attention; any number gives the same.
        prefix: "first", "middle" or "last" (default; "middle" in both directions) in the path; "attend": outside of
            it, each prefix token takes one attention over all tokens instead.
        grid: (h, w) whose path is kept ready.
        num_heads: of the attention for "attend".
        num_prefix: P, so that no attention is made without prefix tokens.

    Shape: (B, P+N, D) → (B, P+N, D). Works on merged, dropped and padded tokens: see
        :class:`~vitkit.models.token_line.TokenLine`.
    Raises: UnknownName for another order or place; BadInput for sizes that do not divide or are below 1.
    Paper: Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality,
        arXiv:2405.21060; a foundation of Vision Mamba in Remote Sensing, arXiv:2505.00630.
    Departs from the paper: 64 states (its code: 128). Path, prefix tokens and the second direction are vision's and
        ours; norm and residual are those of the host's block.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True

    def __init__(
        self,
        dim: int,
        order: str = "raster",
        bidirectional: bool = False,
        expand: float = 2,
        d_state: int = 64,
        head_dim: int | None = None,
        groups: int = 1,
        d_conv: int = 4,
        chunk: int = 64,
        prefix: str | None = None,
        grid: tuple[int, int] | None = None,
        num_heads: int = 1,
        num_prefix: int = 1,
    ) -> None:
        super().__init__()
        if prefix is None:
            prefix = "middle" if bidirectional else "last"
        inner = inner_width(dim, expand)
        if head_dim is None:
            head_dim = next(c for c in range(min(inner, 64), 0, -1) if inner % c == 0)
        if min(d_state, head_dim, groups) < 1 or inner % head_dim or (inner // head_dim) % groups:
            raise BadInput(
                f"Mamba2: head_dim={head_dim} must divide the {inner} inner channels and groups={groups} the number "
                f"of heads, and d_state={d_state} be at least 1; head_dim=None and groups=1 always work."
            )
        self.line = make_line((order,), bidirectional, prefix, grid, "Mamba2")
        paths, heads = self.line.num_paths, inner // head_dim
        self.heads, self.groups, self.chunk = heads, groups, chunk
        self.sizes = (inner, inner + 2 * groups * d_state, heads)
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.conv = CausalConv(paths * self.sizes[1], d_conv)
        self.dt_bias = nn.Parameter(start_of_steps(paths, heads))
        self.A_log = nn.Parameter(torch.empty(paths, heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(paths, heads))
        self.norm = GatedRMSNorm(inner, groups)
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
        bidirectional: bool = False,
        expand: float = 2,
        d_state: int = 64,
        head_dim: int | None = None,
        groups: int = 1,
        d_conv: int = 4,
        chunk: int = 64,
        prefix: str | None = None,
    ) -> Mamba2:
        """An attention has no counterpart in a scan; ``warm`` starts the attention of ``prefix="attend"`` from it."""
        new = cls(
            spec.dim, order, bidirectional, expand, d_state, head_dim, groups, d_conv, chunk, prefix, spec.grid,
            spec.num_heads, spec.num_prefix,
        )  # fmt: skip
        if warm and new.attend is not None:
            new.attend = CrossAttention.like(old, spec.dim, spec.num_heads)
        return new

    def no_weight_decay(self) -> set[str]:
        """Decay would pull A towards −1 and the steps towards softplus(0) = 0.69."""
        return {"A_log", "D", "dt_bias"}

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        num_prefix = layout.num_prefix
        rows = x if self.joins else x[:, num_prefix:]
        paths = self.line.paths(layout, x.shape[0], x.device, num_prefix if self.joins else 0)
        z, mixed, step = self.in_proj(rows).split(self.sizes, -1)
        lines, steps = self.line.gather(mixed, paths), self.line.gather(step, paths)
        if paths.still is not None:
            # padding is silent for the convolution, which has zeros at the ends of a path anyway
            lines = lines.masked_fill(paths.still.unsqueeze(-1), 0)
        lines = F.silu(self.conv(lines.flatten(2))).view(lines.shape)
        y = self.line.restore(self.scan(lines, steps, paths.still), paths).sum(2)
        return with_prefix(self.out_proj(self.norm(y, z)), x, layout, self.joins, self.attend)

    def scan(self, lines: Tensor, steps: Tensor, still: Tensor | None = None) -> Tensor:
        """All paths in one scan.

        Args:
            lines: u, B and C behind the convolution, (B, L, K, E + 2GS). steps: δ (B, L, K, H).
            still: (B, L, K) bool, where no time passes.

        Returns: y (B, L, K, E).
        """
        inner, width = self.sizes[0], lines.shape[-1]
        u, b, c = lines.split((inner, (width - inner) // 2, (width - inner) // 2), -1)
        # steps of 16 bits would round the decay away
        wide = torch.promote_types(steps.dtype, torch.float32)
        delta = F.softplus(steps.to(wide) + self.dt_bias.to(wide))
        if still is not None:
            delta = delta.masked_fill(still.unsqueeze(-1), 0)
        # the heads and groups of all paths side by side
        b, c = (t.unflatten(-1, (self.groups, -1)).flatten(2, 3) for t in (b, c))
        y, _ = ssd_scan(
            u.unflatten(-1, (self.heads, -1)).flatten(2, 3),
            delta.flatten(2),
            -self.A_log.to(wide).exp().flatten(),
            b,
            c,
            self.D.flatten(),
            chunk=self.chunk,
        )
        return y.flatten(2).view(u.shape)
