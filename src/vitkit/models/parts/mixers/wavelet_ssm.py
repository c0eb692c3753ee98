"""A split by frequency: what is smooth is scanned at half the resolution, what is sharp is convolved."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.cells import as_tokens
from vitkit.models.cross_attention import CrossAttention
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.mamba import with_prefix
from vitkit.models.parts.mixers.ss2d import SS2D
from vitkit.models.scan_order import CROSS
from vitkit.models.spec import PartSpec

# B batch · P prefix tokens · N = h·w patches · D width


class WaveletSSM(nn.Module):
    """Haar wavelet → low band through SS2D, three high bands through a depthwise convolution → inverse → linear.

    The low band has a quarter of the tokens, and so a quarter of the scan's cost. An odd side is extended by its last
    row or column. Prefix tokens take one attention over all tokens.

    Args:
        dim: D.
        orders: paths of the scan over the low band; default rows and columns, forwards and backwards.
        expand: inner width of the scan over D.
        d_state: S, states per channel.
        grid: (h, w) whose paths are kept ready.
        num_heads: of the attention of prefix tokens. num_prefix: P; without prefix tokens there is none.

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: UnknownName for another order; ValueError after tokens were merged, dropped or padded.
    Paper: the frequency hybrids of Vision Mamba in Remote Sensing, arXiv:2505.00630.
    Departs from the paper: a survey's mechanism class in its plainest form; one level of the Haar wavelet and the
        linear layer are ours.
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
        grid: tuple[int, int] | None = None,
        num_heads: int = 1,
        num_prefix: int = 1,
    ) -> None:
        super().__init__()
        half = None if grid is None else ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        self.low = SS2D(dim, orders, expand, d_state, grid=half, num_prefix=0)
        self.high = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attend = CrossAttention(dim, num_heads) if num_prefix else None

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        orders: tuple[str, ...] | str = CROSS,
        expand: float = 2,
        d_state: int = 16,
    ) -> WaveletSSM:
        """An attention has no counterpart in a scan; ``warm`` starts the attention of prefix tokens from it."""
        new = cls(spec.dim, orders, expand, d_state, spec.grid, spec.num_heads, spec.num_prefix)
        if warm and new.attend is not None:
            new.attend = CrossAttention.like(old, spec.dim, spec.num_heads)
        return new

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        grid = layout.require_full_grid("WaveletSSM")
        if len(grid) != 2:
            raise BadInput(f"WaveletSSM splits a plane, not a grid of {'×'.join(map(str, grid))}; use ss2d.")
        h, w = grid
        low, high = haar(x[:, layout.num_prefix :].transpose(1, 2).unflatten(2, (h, w)))
        half = tuple(low.shape[-2:])
        low = self.low(as_tokens(low), TokenLayout(grid=half)).transpose(1, 2).unflatten(2, half)
        cells = inverse_haar(low, self.high(high))[..., :h, :w]
        return with_prefix(self.proj(as_tokens(cells)), x, layout, False, self.attend)


def haar(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (B, D, h, w) → low band (B, D, ⌈h/2⌉, ⌈w/2⌉) and the three high bands (B, 3D, …); orthonormal."""
    h, w = maps.shape[-2:]
    even = F.pad(maps, (0, w % 2, 0, h % 2), mode="replicate")
    a, b, c, d = even[..., ::2, ::2], even[..., ::2, 1::2], even[..., 1::2, ::2], even[..., 1::2, 1::2]
    return (a + b + c + d) / 2, torch.cat([a - b + c - d, a + b - c - d, a - b - c + d], 1) / 2


def inverse_haar(low: Tensor, high: Tensor) -> Tensor:
    """The inverse of :func:`haar` on even sides: (B, D, h, w) and (B, 3D, h, w) → (B, D, 2h, 2w)."""
    x, y, z = high.chunk(3, 1)
    upper = torch.stack([low + x + y + z, low - x + y - z], -1).flatten(-2)
    lower = torch.stack([low + x - y - z, low - x - y + z], -1).flatten(-2)
    return torch.stack([upper, lower], -2).flatten(-3, -2) / 2
