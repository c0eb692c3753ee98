"""A gate that a small MLP-Mixer computes from all tokens, in place of attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import NeedsFixedGrid, PartSpec

# n = P+N tokens, fixed · d_t, d_c hidden widths of the token and the channel MLP


class NiNformer(nn.Module):
    """``update = (W x + b) ⊙ v`` with the gate v of one Mixer block on the normalised tokens x of the host's block.

    ``m = x + MLP_tokens(LN(x))`` along the n tokens, ``v = m + MLP_channels(LN(m))`` along the D channels, both with
    GELU: a dynamic mixer whose cost is linear in D. It is built for one number of tokens, prefix tokens among them;
    :meth:`resize` makes it fit another grid. What a token sees depends on where it stands, so position tables are not
    needed to tell tokens apart.

    Args:
        num_tokens: n.
        dim: D.
        token_dim, channel_dim: d_t and d_c. None: the hidden width of the host's MLP, as in the paper's program.
        drop: dropout behind each layer of the two MLPs.
        share_norm: one LayerNorm for both MLPs, as in the paper's program; default two.
        grid: (h, w) of the patches among the tokens.

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: NeedsFixedGrid for another number of tokens than it was built for; ValueError after tokens were merged.
    Paper: NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function, arXiv:2403.02411.
    Departs from the paper: two norms by default; residual, norm and MLP are those of the host's block.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        token_dim: int | None = None,
        channel_dim: int | None = None,
        drop: float = 0.0,
        share_norm: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        token_dim, channel_dim = token_dim or 2 * dim, channel_dim or 2 * dim
        if min(num_tokens, token_dim, channel_dim) < 1:
            raise BadInput(f"token_dim={token_dim} and channel_dim={channel_dim} must be at least 1.")
        self.num_tokens, self.grid = num_tokens, grid or (num_tokens, 1)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = self.norm1 if share_norm else nn.LayerNorm(dim)
        self.tokens = _mlp(num_tokens, token_dim, drop)
        self.channels = _mlp(dim, channel_dim, drop)
        self.linear = nn.Linear(dim, dim)

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        token_dim: int | None = None,
        channel_dim: int | None = None,
        drop: float = 0.0,
        share_norm: bool = False,
    ) -> NiNformer:
        hidden = round(spec.dim * spec.mlp_ratio)
        return cls(
            spec.num_tokens, spec.dim, token_dim or hidden, channel_dim or hidden, drop, share_norm, grid=spec.grid
        )

    def gate(self, x: Tensor) -> Tensor:
        """v (B, n, D): the output of the Mixer block."""
        mixed = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return mixed + self.channels(self.norm2(mixed))

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        layout.require_full_grid("NiNformer")
        if x.shape[1] != self.num_tokens:
            raise NeedsFixedGrid(
                f"NiNformer was built for {self.num_tokens} tokens and got {x.shape[1]} ({layout.num_prefix} prefix "
                f"tokens and a grid of {'×'.join(map(str, layout.grid))}); resize the images, or call "
                f"resize({tuple(layout.grid)}) on each NiNformer of the model."
            )
        return self.linear(x) * self.gate(x)

    @torch.no_grad()
    def resize(self, grid: tuple[int, int], mode: Literal["bicubic", "bilinear", "nearest"] = "bicubic") -> None:
        """Make it fit patches of another grid, in place: weights of the token MLP are interpolated over the patches.

        Prefix rows and columns stay; weights that read patches are scaled by N_old/N_new, so that their sums keep
        their size.

        Args:
            grid: the new (h, w). mode: of the interpolation.
        """
        if tuple(grid) == tuple(self.grid):
            return
        first: nn.Linear = self.tokens[0]  # type: ignore[assignment]
        second: nn.Linear = self.tokens[3]  # type: ignore[assignment]
        old, new = self.grid[0] * self.grid[1], grid[0] * grid[1]
        num_prefix = self.num_tokens - old

        def over_patches(rows: Tensor, scale: float = 1.0) -> Tensor:
            """(k, P+N) → (k, P+N')."""
            maps = rows[:, num_prefix:].unflatten(1, self.grid).unsqueeze(1).float()
            smooth = {} if mode == "nearest" else {"align_corners": False}
            grown = F.interpolate(maps, size=tuple(grid), mode=mode, **smooth).flatten(1).to(rows.dtype)
            return torch.cat([rows[:, :num_prefix], scale * grown], 1)

        first.weight = nn.Parameter(over_patches(first.weight, old / new))
        second.weight = nn.Parameter(over_patches(second.weight.T).T.contiguous())
        second.bias = nn.Parameter(over_patches(second.bias[None])[0])
        first.in_features = second.out_features = self.num_tokens = num_prefix + new
        self.grid = (grid[0], grid[1])

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}"


def _mlp(width: int, hidden: int, drop: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Dropout(drop), nn.Linear(hidden, width), nn.Dropout(drop)
    )
