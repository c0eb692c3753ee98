"""Positions that a convolution reads off the neighbours of a patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.cells import as_tokens
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

# B batch · P prefix tokens · N = h·w patches · D width


class CPE(nn.Module):
    """Conditional positions: ``x ← x + DWConv_k(x)`` on the grid of patches, zero outside of it.

    The zeros around the grid tell where its border is, the neighbours what stands nearby; any grid will do. Prefix
    tokens are left as they are. The kernel starts at zero, so a host that keeps its table computes what it did.

    Args:
        dim: D.
        kernel_size: odd, 3 by default.
        keep_absolute: False removes the host's table of absolute positions, as in the paper.

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: BadInput for an even kernel. ValueError for tokens that are no full grid.
    Paper: Conditional Positional Encodings for Vision Transformers, arXiv:2102.10882; a mechanism of Image Recognition
        with Online Lightweight Vision Transformer: A Survey, arXiv:2505.03113.
    Departs from the paper: it stands before the first block, where timm's hosts take positions, and not behind it;
        the kernel starts at zero.
    """

    slot = "position"
    preserves = "none"

    def __init__(self, dim: int, kernel_size: int = 3, keep_absolute: bool = False) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise BadInput(f"cpe: kernel_size={kernel_size} must be odd, such as {max(3, kernel_size + 1)}.")
        self.keep_absolute = keep_absolute
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        nn.init.zeros_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        kernel_size: int = 3,
        keep_absolute: bool = False,
    ) -> CPE:
        """A table has no counterpart in a kernel, so ``warm`` changes nothing."""
        return cls(spec.dim, kernel_size, keep_absolute)

    def embed(self, x: Tensor, layout: TokenLayout, images: Tensor | None = None) -> Tensor:
        grid = layout.require_full_grid("cpe")
        if len(grid) != 2:
            raise BadInput(f"cpe convolves a plane; the grid {'×'.join(map(str, grid))} has {len(grid)} axes.")
        cells = x[:, layout.num_prefix :].transpose(1, 2).unflatten(2, grid)
        # the sum on cells, which is twice as fast as on rows that lie apart
        return torch.cat([x[:, : layout.num_prefix], as_tokens(cells + self.conv(cells))], 1)

    forward = embed

    def extra_repr(self) -> str:
        return f"keep_absolute={self.keep_absolute}"
