"""S4D as a token mixer: a linear recurrence along a path that is the same for every token, hence a convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown
from vitkit.models.cross_attention import CrossAttention
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.mamba import make_line, with_prefix
from vitkit.models.scan import lti_scan
from vitkit.models.spec import PartSpec

# B batch · P prefix tokens · N patches · K paths · D width · S states

#: how the diagonal A starts
INITS = ("lin", "inv", "real")


class DiagonalSSM(nn.Module):
    """E channels, each a state-space layer with a diagonal A and nothing that depends on the input.

    ``h′ = A h + u``, ``y = Re(C h)`` in continuous time, sampled with the learned step Δ of the channel (zero-order
    hold): see :func:`~vitkit.models.scan.lti_scan`. The real part of A is −exp of a parameter and so stays negative.

    Args:
        channels: E.
        d_state: S; complex states come in conjugate pairs, of which S/2 are kept.
        init: A_n = −1/2 + iπn ("lin"), −1/2 + i(S/π)(S/(2n+1) − 1) ("inv"), or −(n+1), all real ("real").

    Shape: (B, L, E) → (B, L, E).
    Raises: BadInput for an odd ``d_state`` with complex states, or a size below 1; UnknownName for another ``init``.
    Paper: On the Parameterization and Initialization of Diagonal State Space Models, arXiv:2206.11893.
    """

    def __init__(self, channels: int, d_state: int = 64, init: str = "lin") -> None:
        super().__init__()
        if init not in INITS:
            raise unknown("start of the diagonal", init, INITS, "vitkit show s4d")
        real = init == "real"
        if min(channels, d_state) < 1 or (d_state % 2 and not real):
            raise BadInput(
                f"S4D: d_state={d_state} and {channels} channels must be at least 1, and d_state even: its states are "
                f'conjugate pairs; use d_state={d_state + 1} or init="real".'
            )
        kept = d_state if real else d_state // 2
        n = torch.arange(kept, dtype=torch.float32)
        # log-uniform, as in Mamba
        self.log_step = nn.Parameter(torch.empty(channels).uniform_(math.log(1e-3), math.log(0.1)))
        decay = (n + 1) if real else torch.full((kept,), 0.5)
        self.A_log = nn.Parameter(decay.log().repeat(channels, 1))
        self.A_imag: nn.Parameter | None = None
        if not real:
            turn = math.pi * n if init == "lin" else d_state / math.pi * (d_state / (2 * n + 1) - 1)
            self.A_imag = nn.Parameter(turn.repeat(channels, 1))
        # real and imaginary parts, each with half the variance
        self.C = nn.Parameter(torch.randn(channels, kept, 1 if real else 2) * (1 if real else 0.5**0.5))

    def no_weight_decay(self) -> set[str]:
        """Decay would pull poles and steps to places of their own."""
        return {"log_step", "A_log"} | (set() if self.A_imag is None else {"A_imag"})

    def forward(self, u: Tensor) -> Tensor:
        # complex numbers of 16 bits cannot be multiplied
        C = self.C.to(torch.promote_types(self.C.dtype, torch.float32))
        A = -self.A_log.to(C.dtype).exp()
        if self.A_imag is None:
            C = C.squeeze(-1)
        else:
            A, C = torch.complex(A, self.A_imag.to(C.dtype)), torch.view_as_complex(C)
        return lti_scan(u, self.log_step.to(A.real.dtype).exp(), A, torch.ones_like(A), C)


class S4D(nn.Module):
    """One linear, time-invariant recurrence along a path through the patches, then a gate on each token.

    ``y = SSM(x) + D ⊙ x`` along the path, ``update = a ⊙ σ(b)`` with ``(a, b) = W GELU(y)``. Unlike
    :class:`~vitkit.models.parts.mixers.mamba.Mamba` it cannot choose by content what to keep, and is a convolution as
    long as the path.

    Args:
        dim: D.
        order: path through the grid, see :func:`~vitkit.models.time_order.time_order`.
        bidirectional: walk the path backwards too, with weights of its own; the two are summed.
        d_state: S, states per channel.
        init: "lin", "inv" or "real", see :class:`DiagonalSSM`.
        prefix: "first", "middle" or "last" (default; "middle" in both directions) in the path; "attend": outside of
            it, each prefix token takes one attention over all tokens instead.
        grid: (h, w) whose path is kept ready.
        num_heads: of the attention for "attend".
        num_prefix: P, so that no attention is made without prefix tokens.

    Shape: (B, P+N, D) → (B, P+N, D). Works on merged, dropped and padded tokens: see
        :class:`~vitkit.models.token_line.TokenLine`.
    Raises: UnknownName for another order, place or start; BadInput for impossible sizes.
    Paper: On the Parameterization and Initialization of Diagonal State Space Models, arXiv:2206.11893; a foundation of
        Vision Mamba in Remote Sensing, arXiv:2505.00630.
    Departs from the paper: the path and prefix tokens are vision's; norm and residual are those of the host's block.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True
    onnx_note = 'its poles are complex, and the exporter has no complex exponential; init="real" exports'

    def __init__(
        self,
        dim: int,
        order: str = "raster",
        bidirectional: bool = False,
        d_state: int = 64,
        init: str = "lin",
        prefix: str | None = None,
        grid: tuple[int, int] | None = None,
        num_heads: int = 1,
        num_prefix: int = 1,
    ) -> None:
        super().__init__()
        if prefix is None:
            prefix = "middle" if bidirectional else "last"
        self.line = make_line((order,), bidirectional, prefix, grid, "S4D")
        self.ssm = DiagonalSSM(self.line.num_paths * dim, d_state, init)
        self.D = nn.Parameter(torch.ones(dim))
        self.out_proj = nn.Linear(dim, 2 * dim)
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
        d_state: int = 64,
        init: str = "lin",
        prefix: str | None = None,
    ) -> S4D:
        """An attention has no counterpart in a scan; ``warm`` starts the attention of ``prefix="attend"`` from it."""
        new = cls(
            spec.dim, order, bidirectional, d_state, init, prefix, spec.grid, spec.num_heads, spec.num_prefix
        )  # fmt: skip
        if warm and new.attend is not None:
            new.attend = CrossAttention.like(old, spec.dim, spec.num_heads)
        return new

    def no_weight_decay(self) -> set[str]:
        return {"D"}

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        num_prefix = layout.num_prefix
        rows = x if self.joins else x[:, num_prefix:]
        paths = self.line.paths(layout, x.shape[0], x.device, num_prefix if self.joins else 0)
        lines = self.line.gather(rows, paths)
        if paths.still is not None:
            # padding stands at an end of each path, where silence changes nothing
            lines = lines.masked_fill(paths.still.unsqueeze(-1), 0)
        y = self.line.restore(self.ssm(lines.flatten(2)).view(lines.shape), paths).sum(2) + self.D * rows
        return with_prefix(F.glu(self.out_proj(F.gelu(y))), x, layout, self.joins, self.attend)
