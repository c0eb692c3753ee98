"""Cutting a map into groups of P×P cells for attention: neighbours (blocks) or a dilated grid, and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# B batch · C channels · H×W map · p×q cells of a group · G groups of an image


def cut(x: Tensor, size: int, dilated: bool = False) -> tuple[Tensor, Tensor | None]:
    """Groups of at most ``size`` × ``size`` cells as sequences of tokens.

    A block holds neighbouring cells; a dilated group holds cells that lie ⌈H/p⌉ rows and ⌈W/q⌉ columns apart, so it
    spans the whole map. A side shorter than ``size`` is one group; a side that the groups do not divide is padded.

    >>> tokens, real = cut(torch.arange(16.0).view(1, 1, 4, 4), 2)
    >>> tokens[0, :, 0].tolist(), cut(torch.arange(16.0).view(1, 1, 4, 4), 2, dilated=True)[0][0, :, 0].tolist()
    ([0.0, 1.0, 4.0, 5.0], [0.0, 2.0, 8.0, 10.0])

    Args:
        x: (B, C, H, W). size: P. dilated: grid groups in place of blocks.

    Returns: tokens (B·G, p·q, C), and which of them are no padding, (B·G, p·q) bool; None if all. Every group has some.
    """
    batch, _, height, width = x.shape
    p, q = min(size, height), min(size, width)
    pad = (0, -width % q, 0, -height % p)
    padded = F.pad(x, pad) if any(pad) else x
    tokens = _groups(padded, p, q, dilated)
    if not any(pad):
        return tokens, None
    real = F.pad(torch.ones(1, 1, height, width, device=x.device), pad)
    return tokens, _groups(real, p, q, dilated)[..., 0].bool().repeat(batch, 1)


def join(tokens: Tensor, height: int, width: int, size: int, dilated: bool = False) -> Tensor:
    """The inverse of :func:`cut`: (B·G, p·q, C) → (B, C, height, width)."""
    p, q = min(size, height), min(size, width)
    rows, cols = -(-height // p), -(-width // q)
    x = tokens.reshape(-1, rows, cols, p, q, tokens.shape[-1])
    x = x.permute(0, 5, 3, 1, 4, 2) if dilated else x.permute(0, 5, 1, 3, 2, 4)
    return x.reshape(x.shape[0], -1, rows * p, cols * q)[:, :, :height, :width].contiguous()


def _groups(x: Tensor, p: int, q: int, dilated: bool) -> Tensor:
    if dilated:
        x = x.unflatten(3, (q, -1)).unflatten(2, (p, -1)).permute(0, 3, 5, 2, 4, 1)
    else:
        x = x.unflatten(3, (-1, q)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(-1, p * q, x.shape[-1])
