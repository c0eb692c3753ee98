"""Which patches are hidden."""

from __future__ import annotations

import torch
from torch import Tensor


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """⌊N(1−ρ)⌋, at least 1. The 1e-6 corrects floats such as 50·(1−0.9) = 4.999….

    >>> num_visible(50, 0.9), num_visible(16, 0.75), num_visible(4, 0.99)
    (5, 4, 1)
    """
    return max(1, int(num_patches * (1 - mask_ratio) + 1e-6))


def random_mask(
    batch: int, num_patches: int, mask_ratio: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Hide a share ρ of the patches of every image, uniformly at random.

    Args:
        batch: B.
        num_patches: N.
        mask_ratio: ρ in [0, 1).
        device: of the result; drawn from torch's global generator there.

    Returns: indices of the visible patches (B, V), in raster order, and the mask (B, N) bool, True where hidden.

    Raises: ValueError for ρ outside [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio={mask_ratio} must lie in [0, 1); 0.75 is usual.")
    order = torch.rand(batch, num_patches, device=device).argsort(dim=1)
    visible = order[:, : num_visible(num_patches, mask_ratio)].sort(dim=1).values
    mask = torch.ones(batch, num_patches, dtype=torch.bool, device=device).scatter_(1, visible, False)
    return visible, mask
