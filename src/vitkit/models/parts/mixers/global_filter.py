"""Tokens mixed in the frequency domain: one learned complex weight a frequency and channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.cross_attention import CrossAttention, attend_from_prefix
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

# B batch · P prefix tokens · N = h·w patches · D width


class GlobalFilter(nn.Module):
    """``update = irfft2(K ⊙ rfft2(x))`` over the grid: a circular convolution with a kernel as large as the image.

    It costs N log N instead of N². K (h, w//2+1, D) is complex and belongs to one grid; on another it is interpolated.
    All ones is the identity.

    Args:
        dim: D. grid: (h, w) the weights are made for.
        num_heads, num_prefix: of the attention through which prefix tokens read all tokens; none without prefix.

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: BadInput for a grid that is no plane; ValueError after tokens were merged or dropped.
    Paper: Global Filter Networks for Image Classification, arXiv:2107.00645; a mechanism of Image Recognition with
        Online Lightweight Vision Transformer: A Survey, arXiv:2505.03113.
    Departs from the paper: prefix tokens, which it does not have, take one attention over all tokens.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True
    compile_note = "complex products run outside of the compiled code"

    def __init__(self, dim: int, grid: tuple[int, int], num_heads: int = 1, num_prefix: int = 0) -> None:
        super().__init__()
        self.grid = grid
        # real and imaginary parts, since safetensors and half-precision casts know no complex numbers
        self.weight = nn.Parameter(torch.randn(grid[0], grid[1] // 2 + 1, dim, 2) * 0.02)
        self.attend = CrossAttention(dim, num_heads) if num_prefix else None

    @classmethod
    def from_standard(cls, old: nn.Module | None, spec: PartSpec, warm: bool = True) -> GlobalFilter:
        """``warm`` starts the attention of prefix tokens from the host's."""
        new = cls(spec.dim, spec.grid, spec.num_heads, spec.num_prefix)
        if warm and new.attend is not None:
            new.attend = CrossAttention.like(old, spec.dim, spec.num_heads)
        return new

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        grid = layout.require_full_grid("The global filter")
        if len(grid) != 2:
            raise BadInput(f"The global filter is for planes; {'×'.join(map(str, grid))} has {len(grid)} axes.")
        seen = attend_from_prefix(self.attend, x, layout, "the global filter")
        return torch.cat([seen, self.filter(x[:, layout.num_prefix :], (grid[0], grid[1]))], 1)

    def filter(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """The circular convolution of (B, N, D) alone."""
        # half-precision FFTs exist for powers of two only
        with torch.autocast(patches.device.type, enabled=False):
            cells = patches.unflatten(1, grid).to(torch.promote_types(patches.dtype, torch.float32))
            spectrum = torch.fft.rfft2(cells, dim=(1, 2), norm="ortho") * self._weight(grid, cells.dtype)
            return torch.fft.irfft2(spectrum, s=grid, dim=(1, 2), norm="ortho").flatten(1, 2).to(patches.dtype)

    def _weight(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """K for ``grid``, (h, w//2+1, D) complex."""
        weight = self.weight.to(dtype)
        if grid != self.grid:
            planes = weight.permute(2, 3, 0, 1).flatten(0, 1)[None]
            size = (grid[0], grid[1] // 2 + 1)
            planes = F.interpolate(planes, size, mode="bicubic", align_corners=True)[0]
            weight = planes.unflatten(0, (-1, 2)).permute(2, 3, 0, 1)
        return torch.view_as_complex(weight.contiguous())

    def extra_repr(self) -> str:
        return f"grid={self.grid}"
