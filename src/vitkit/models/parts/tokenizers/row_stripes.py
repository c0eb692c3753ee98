"""Tokens that are horizontal stripes of the image."""

from __future__ import annotations

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec


class RowStripes(nn.Module):
    """A handful of tokens per image, each a stripe of whole rows that may overlap its neighbours.

    Token t is a linear map of the pixel rows ``t·stride … t·stride + window − 1``, so there are
    N = ⌊(H − window) / stride⌋ + 1 tokens on an N×1 grid: with N+1 a power of two, a class token makes the square
    attention matrix that a quantum circuit needs (8×8 digits with ``window=2, stride=1``: 7 + 1 tokens).

    Args:
        img_size: (H, W) in pixels.
        in_chans: C.
        embed_dim: D.
        window: rows in a stripe.
        stride: rows from one stripe to the next; below ``window`` they overlap. None: half the window.
        host_grid: the patch grid that the host's position table was made for, when it is not the stripes' own.

    Shape: (B, C, H', W) → (B, N, D) and a layout with grid (N, 1). H' may differ from H, W may not.
    Raises: BadInput if a stripe does not fit into the image, or an image has another width or other channels.
    Paper: the tokenization of Born et al., Quantum Doubly Stochastic Transformers, arXiv:2504.16275.
    Departs from the paper: window and stride are free.
    """

    slot = "tokenizer"
    preserves = "none"

    def __init__(
        self,
        img_size: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        window: int,
        stride: int | None = None,
        host_grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        stride = max(1, window // 2) if stride is None else stride
        if not (1 <= window <= height and stride >= 1):
            raise BadInput(f"window={window}, stride={stride}: stripes must fit into {height} rows, both at least 1.")
        self.img_size, self.patch_size, self.stride = (height, width), (window, width), stride
        self.grid_size = ((height - window) // stride + 1, 1)
        self.num_patches = self.grid_size[0]
        self.host_grid = host_grid
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=(window, width), stride=(stride, width))

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        window: int | None = None,
        stride: int | None = None,
    ) -> RowStripes:
        """Stripes as high as a patch unless ``window`` says otherwise; patch weights do not fit, so a fresh start."""
        window = spec.patch_size[0] if window is None else window
        # stripes in place of other stripes: the table still is the one of the patches
        made_for = getattr(old, "host_grid", None) or spec.grid
        return cls(spec.image_size, spec.in_chans, spec.dim, window, stride, host_grid=made_for)

    def forward(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        height, width = images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != self.proj.in_channels:
            raise BadInput(
                f"RowStripes is built for images (B, {self.proj.in_channels}, H, W), not {tuple(images.shape)}."
            )
        if width != self.img_size[1] or height < self.patch_size[0]:
            raise BadInput(
                f"RowStripes is built for images {self.img_size[1]} pixels wide and at least {self.patch_size[0]} "
                f"high, not {height}×{width}; resize them."
            )
        x = self.proj(images).flatten(2).transpose(1, 2)
        return x, TokenLayout(grid=(x.shape[1], 1))

    def pick_positions(self, table: Tensor, grid: tuple[int, ...], layout: TokenLayout) -> Tensor:
        """Rows of the host's table (1, N_host, D) for these stripes, resampled when it was made for another grid."""
        made_for = self.host_grid or self.grid_size
        if tuple(layout.grid) == tuple(made_for):
            return table
        return resample_abs_pos_embed(table, new_size=list(layout.grid), old_size=list(made_for), num_prefix_tokens=0)

    def extra_repr(self) -> str:
        return f"window={self.patch_size[0]}, stride={self.stride}, tokens={self.num_patches}"
