"""Antialiased resizing as matrix products: what every engine has, for sizes that are known only when a graph runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def triangle(x: Tensor) -> Tensor:
    """The kernel of bilinear resizing, of distances (…) in steps; 0 from 1 on."""
    return (1 - x.abs()).clamp(min=0)


def cubic(x: Tensor) -> Tensor:
    """The kernel of bicubic resizing (a = −0.5, as Pillow and PyTorch with antialiasing use); 0 from 2 on.

    >>> cubic(torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0])).tolist()
    [1.0, 0.5625, 0.0, -0.0625, 0.0, 0.0]
    """
    x = x.abs().clamp(max=2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, far)


def resampling_weights(old: Tensor, new: Tensor, step: Tensor, kernel: Callable[[Tensor], Tensor] = triangle) -> Tensor:
    """(n, m) weights of m old samples in each of n new ones, whose middles are ``step`` old samples apart.

    Both rows have the same middle; with a step of 1 and n = m this is the identity.

    Args:
        old: 0, 1, 2 … as floats (m,).
        new: likewise (n,). As tensors, since exporters follow those while a Python number would be fixed.
        step: (1,), positive; above 1 the kernel widens, so that every old sample counts.
        kernel: weight of a distance.
    """
    centres = (old[-1:] + 1) / 2 + step * (new + 0.5 - (new[-1:] + 1) / 2)
    weight = kernel((old + 0.5 - centres[:, None]) / step.clamp(min=1))
    return weight / weight.sum(1, keepdim=True)
