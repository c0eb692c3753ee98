"""Fixed sine–cosine codes of places."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_2d(grid: tuple[int, int], dim: int) -> Tensor:
    """(h·w, dim) codes: half the channels for the row, half for the column, sines then cosines of 10000^(−4k/dim).

    Raises: ValueError when ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim={dim} is not a multiple of 4, which two axes of sines and cosines need.")
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, cols = (torch.arange(n, dtype=torch.float64) for n in grid)
    place = torch.cartesian_prod(rows, cols).reshape(-1, 2)
    angles = place[:, :, None] * omega
    codes = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return codes.flatten(1).float()
