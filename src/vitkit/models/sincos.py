"""Fixed sine–cosine codes of places and dates."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos(places: Tensor, dim: int) -> Tensor:
    """Code every number: sines, then cosines of ``place · 10000^(−2k/dim)``, k = 0 … dim/2 − 1.

    Args:
        places: (…) float, any unit. dim: of a code, even.

    Shape: (…) → (…, dim) in the dtype of ``places``.
    Raises: ValueError when ``dim`` is odd.
    """
    if dim % 2:
        raise ValueError(f"dim={dim} is odd, but codes have as many sines as cosines.")
    omega = 10000 ** -(torch.arange(dim // 2, dtype=places.dtype, device=places.device) / (dim // 2))
    angles = places.unsqueeze(-1) * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(grid: tuple[int, int], dim: int) -> Tensor:
    """(h·w, dim) codes of the cells in raster order: half the channels for the row, half for the column.

    Raises: ValueError when ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim={dim} is not a multiple of 4, which two axes of sines and cosines need.")
    rows, cols = (torch.arange(n, dtype=torch.float64) for n in grid)
    return sincos(torch.cartesian_prod(rows, cols).reshape(-1, 2), dim // 2).flatten(1).float()


def sincos_clip(dates: Tensor, grid: tuple[int, int], dim: int) -> Tensor:
    """Codes of the cells of a clip: half the channels for the date, half for row and column (:func:`sincos_2d`).

    Args:
        dates: (B, T) or (1, T), indices or days. grid: (h, w) cells of a frame. dim: a multiple of 8.

    Returns: (B or 1, T, h·w, dim), float32.
    Raises: ValueError when ``dim`` is not a multiple of 8.
    """
    if dim % 8:
        raise ValueError(f"dim={dim} is not a multiple of 8, which dates, rows and columns need.")
    when = sincos(dates.float(), dim // 2).unsqueeze(2).expand(-1, -1, grid[0] * grid[1], -1)
    where = sincos_2d(grid, dim // 2).to(dates.device).expand(*when.shape[:3], -1)
    return torch.cat([when, where], dim=-1)
