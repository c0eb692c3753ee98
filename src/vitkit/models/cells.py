"""Tokens on their grid and back, for blocks that convolve."""

from __future__ import annotations

from torch import Tensor

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout

# B batch · P prefix tokens · N = n₁·…·n_d patches · C channels


def as_cells(x: Tensor, layout: TokenLayout, axes: int, who: str, hint: str = "") -> Tensor:
    """The patches of tokens (B, P+N, C) on their grid, (B, C, n₁, …, n_d).

    Args:
        axes: d that ``who`` can work on. hint: end of the message if the grid has others.

    Raises: BadInput if the grid has other than ``axes`` axes; ValueError if it is not full.
    """
    grid = layout.require_full_grid(who)
    if len(grid) != axes:
        raise BadInput(
            f"{who} works on grids of {axes} axes, and {'×'.join(map(str, grid))} has {len(grid)}{hint and '; '}{hint}."
        )
    return x[:, layout.num_prefix :].transpose(1, 2).unflatten(2, grid)


def as_tokens(cells: Tensor) -> Tensor:
    """(B, C, n₁, …, n_d) → (B, N, C) in raster order.

    >>> import torch
    >>> as_tokens(torch.zeros(2, 8, 3, 5)).shape
    torch.Size([2, 15, 8])
    """
    # flatten(2).transpose(1, 2) would do, but the gradient it hands back for a single image has a stride that batch
    # norm in eval mode on a CPU (PyTorch 2.15) reads wrongly
    return cells.movedim(1, -1).flatten(1, -2)
