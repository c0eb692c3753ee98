"""Attention inside blocks of patches that each carry their own copy of the class token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.rehost import adopt
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Attention

# n_b blocks · M patches of a block


class PartitionedAttention(Attention):
    """P-MSA: self-attention within n_b rectangles of the grid, ``[prefix; block_b]`` for each b, with shared weights.

    Patches see their own block and the prefix; the prefix tokens get the mean of their n_b outputs, so that they are
    the only way between blocks. The attention products cost 1/n_b of the whole grid's. A grid that the rectangles do
    not divide is padded; padding is no key. With ``blocks=1`` this is the host's attention.

    Args:
        blocks: n_b; the grid is cut into the most square r × c = n_b rectangles. Default 4.

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: BadInput for ``blocks`` below 1 or more blocks along a side than cells; ValueError after tokens were merged
        or dropped, since blocks are rectangles of the full grid.
    Paper: ECViT: Efficient Convolutional Vision Transformer with Local-Attention and Multi-scale Stages,
        arXiv:2504.14825.
    Departs from the paper: it is known by its abstract and public formulas; the mean over the copies of the prefix and
        the padding are ours. Attention maps of blocks are not offered to taps, as they are no (P+N)×(P+N) matrix.
    """

    slot = "mixer"
    preserves = "none"
    blocks = 1

    @classmethod
    def from_standard(
        cls, old: nn.Module | None, spec: PartSpec, warm: bool = True, blocks: int = 4
    ) -> PartitionedAttention:
        if warm and isinstance(old, Attention):
            new = adopt(cls, old)
        else:
            new = cls(spec.dim, num_heads=spec.num_heads, qkv_bias=True)
        new.set_blocks(blocks, spec.grid)
        return new

    def set_blocks(self, blocks: int, grid: tuple[int, ...]) -> None:
        """Cut a grid (h, w) into ``blocks`` rectangles from now on."""
        if blocks < 1:
            raise BadInput(f"blocks={blocks} must be at least 1.")
        rows = max(r for r in range(1, math.isqrt(blocks) + 1) if blocks % r == 0)
        self.blocks, self.cut = blocks, (rows, blocks // rows)
        if self.cut[0] > grid[0] or self.cut[1] > grid[1]:
            raise BadInput(
                f"blocks={blocks} cuts the grid into {self.cut[0]}×{self.cut[1]} rectangles, but it has "
                f"{grid[0]}×{grid[1]} cells; use at most {min(grid) ** 2}."
            )

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        if self.blocks == 1:
            return super().forward(x, layout)
        h, w = layout.require_full_grid("Partitioned attention")
        num_prefix, batch = layout.num_prefix, x.shape[0]
        prefix, patches = x[:, :num_prefix], x[:, num_prefix:]
        blocks, real = self._cut(patches, h, w)
        copies = prefix.repeat_interleave(self.blocks, 0)
        coords = self._cut(layout.coordinates(x.device, torch.float32).expand(batch, -1, -1), h, w)[0]
        inner = layout.replace(
            grid=(-(-h // self.cut[0]), -(-w // self.cut[1])),
            coords=coords,
            valid=None if real is None else real.repeat(batch, 1),
            tap=None,
        )
        out = super().forward(torch.cat([copies, blocks], 1), inner)
        shared = out[:, :num_prefix].unflatten(0, (batch, self.blocks)).mean(1)
        return torch.cat([shared, self._join(out[:, num_prefix:], h, w)], 1)

    def _cut(self, values: Tensor, h: int, w: int) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) → (B·n_b, M, D), and which of the M are no padding, (n_b, M); None if all."""
        (rows, cols), (batch, _, dim) = self.cut, values.shape
        pad = (-h % rows, -w % cols)
        grid = F.pad(values.reshape(batch, h, w, dim), (0, 0, 0, pad[1], 0, pad[0]))
        cut = (
            grid.unflatten(2, (cols, -1)).unflatten(1, (rows, -1)).transpose(2, 3).reshape(batch * self.blocks, -1, dim)
        )
        if pad == (0, 0):
            return cut, None
        real = F.pad(torch.ones(h, w, dtype=torch.bool, device=values.device), (0, pad[1], 0, pad[0]))
        return cut, real.unflatten(1, (cols, -1)).unflatten(0, (rows, -1)).transpose(1, 2).reshape(self.blocks, -1)

    def _join(self, blocks: Tensor, h: int, w: int) -> Tensor:
        """The inverse of :meth:`_cut`: (B·n_b, M, D) → (B, N, D)."""
        rows, cols = self.cut
        sides = (-(-h // rows), -(-w // cols))
        grid = blocks.reshape(-1, rows, cols, *sides, blocks.shape[-1]).transpose(2, 3)
        grid = grid.reshape(grid.shape[0], rows * sides[0], cols * sides[1], -1)
        return grid[:, :h, :w].flatten(1, 2)

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}"
