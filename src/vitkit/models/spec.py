"""Facts a part may need about the place it is put in."""

from __future__ import annotations

from dataclasses import dataclass


class NeedsFixedGrid(ValueError):
    """A part that is built for one number of tokens was asked to serve another, or a changing one."""


@dataclass(frozen=True, kw_only=True)
class PartSpec:
    """The place of a part in its host; given to every ``from_standard``.

    Args:
        dim: D, width of a token.
        num_heads: H of the block (of the first block, for model-level slots).
        head_dim: d.
        mlp_ratio: hidden width of the MLP over D.
        grid: patch cells (h, w) at the host's input size.
        num_prefix: P, class + register tokens.
        depth: index of the block, None for model-level slots.
        num_blocks: L.
        image_size: (H, W) in pixels.
        patch_size: (p_h, p_w) in pixels.
        in_chans: image channels C.
        num_classes: outputs of the head.
    """

    dim: int
    num_heads: int
    head_dim: int
    mlp_ratio: float
    grid: tuple[int, int]
    num_prefix: int
    depth: int | None
    num_blocks: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int
    num_classes: int

    @property
    def num_patches(self) -> int:
        """N = h·w."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """P + N."""
        return self.num_prefix + self.num_patches
