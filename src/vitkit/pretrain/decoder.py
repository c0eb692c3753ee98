"""The small transformer that fills in hidden patches."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitkit.pretrain.positions import sincos_2d


class TokenDecoder(nn.Module):
    """Visible tokens → predictions for all patches.

    Project to the decoder's width, put a shared learned mask token at hidden places, add fixed sine–cosine positions,
    run plain blocks, project to pixels.

    Args:
        dim: width of the encoder's tokens.
        width: of the decoder; a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: of the blocks.
        out: numbers per patch.
        grid: patch cells (h, w) for which positions are kept ready; those of other grids are computed when they come.
    """

    positions: Tensor

    def __init__(self, dim: int, width: int, depth: int, num_heads: int, out: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.width = grid, width
        self.project = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("positions", sincos_2d(grid, width).unsqueeze(0), persistent=False)
        self.blocks = nn.Sequential(*[Block(width, num_heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, out)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        visible: Tensor,
        num_prefix: int,
        grid: tuple[int, int] | None = None,
        codes: Tensor | None = None,
    ) -> Tensor:
        """(B, P+V, D) encoder tokens and the (B, V) places of the visible ones → (B, N, out).

        Args:
            tokens: of the encoder.
            visible: their places in raster order of the grid.
            num_prefix: P.
            grid: cells of these images, N = h·w; None is the grid given at the beginning.
            codes: (1 or B, N, width) of all places, in place of those of a grid.
        """
        x = self.project(tokens)
        positions = self.positions
        if codes is not None:
            positions = codes
        elif grid is not None and grid != self.grid:
            positions = sincos_2d(grid, self.width).to(x.device).unsqueeze(0)
        prefix, seen = x[:, :num_prefix], x[:, num_prefix:]
        full = self.mask_token.to(x.dtype).expand(x.shape[0], positions.shape[1], -1)
        full = full.scatter(1, visible.unsqueeze(-1).expand(-1, -1, x.shape[-1]), seen)
        x = torch.cat([prefix, full + positions.to(x.dtype)], dim=1)
        return self.pixels(self.norm(self.blocks(x)))[:, num_prefix:]
