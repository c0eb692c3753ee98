"""How much a piece of an image would lose by downscaling, judged from its pixels alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# B images · n cells in an image · h×w pixels in a cell


def frequency(cells: Tensor) -> Tensor:
    """Mean log-magnitude of the spectrum, ``mean log(1 + |FFT|)``: (B, n, h, w) → (B, n)."""
    return torch.fft.fft2(cells).abs().log1p().mean((-2, -1))


def gradient(cells: Tensor) -> Tensor:
    """Mean squared Sobel gradient, borders repeated: (B, n, h, w) → (B, n)."""
    batch = cells.shape[:2]
    across = cells.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([across, across.T])[:, None]
    padded = F.pad(cells.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernels).square().sum(1).mean((-2, -1)).unflatten(0, batch)


def entropy(cells: Tensor, bins: int = 256) -> Tensor:
    """Entropy in nats of the grey values in ``bins`` equal bins between the image's extremes: (B, n, h, w) → (B, n)."""
    low, high = cells.amin((1, 2, 3), keepdim=True), cells.amax((1, 2, 3), keepdim=True)
    # a constant image has one bin, not 0/0
    level = (cells - low) / (high - low).clamp(min=torch.finfo(cells.dtype).tiny)
    place = (level * bins).long().clamp(0, bins - 1).flatten(2)
    share = torch.zeros(*place.shape[:2], bins, device=cells.device, dtype=cells.dtype)
    share = share.scatter_add_(2, place, torch.full_like(place, 1, dtype=cells.dtype)) / place.shape[-1]
    return torch.special.entr(share).sum(-1)
