"""Images as rows of pixels, and back."""

from __future__ import annotations

from torch import Tensor


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) → (B, N, p_h·p_w·C), patches in raster order.

    Raises: ValueError when the patch size does not divide the image.
    """
    (h, w), (ph, pw) = images.shape[-2:], patch_size
    if h % ph or w % pw:
        raise ValueError(f"{ph}×{pw} patches do not divide images of {h}×{w} pixels.")
    cut = images.unflatten(-1, (-1, pw)).unflatten(-3, (-1, ph))
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(rows: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Inverse of :func:`patchify`: (B, N, p_h·p_w·C) → (B, C, H, W).

    >>> import torch
    >>> x = torch.rand(2, 3, 6, 8)
    >>> bool(torch.equal(unpatchify(patchify(x, (3, 2)), (3, 2), (2, 4)), x))
    True
    """
    ph, pw = patch_size
    cut = rows.unflatten(1, grid).unflatten(-1, (ph, pw, -1))
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
