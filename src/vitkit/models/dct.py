"""The orthonormal discrete cosine transform as a matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitkit.errors import BadInput


def dct_matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """The n×n orthonormal DCT-II matrix ``D``: ``x @ D.T`` are the DCT coefficients of x along its last axis.

    ``D[k, j] = s_k · cos(π(2j+1)k / 2n)`` with ``s_0 = √(1/n)`` and ``s_k = √(2/n)`` otherwise, so that
    ``D @ D.T = I`` and the inverse transform is ``x̂ @ D``.

    >>> d = dct_matrix(4, torch.float64)
    >>> bool(torch.allclose(d @ d.T, torch.eye(4, dtype=torch.float64)))
    True

    Args:
        n: length of the transform, at least 1.
        dtype: of the result; computed in float64 whatever it is.
        device: of the result.

    Raises: BadInput if ``n`` is below 1.
    """
    if n < 1:
        raise BadInput(f"dct_matrix(n={n}): a transform needs at least one sample.")
    k = torch.arange(n, dtype=torch.float64)[:, None]
    j = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / (2 * n) * (2 * j + 1) * k) * math.sqrt(2 / n)
    matrix[0] = math.sqrt(1 / n)
    return matrix.to(dtype=dtype, device=device)


def dct_rows(n: int, num_rows: int | None = None) -> Tensor:
    """The first ``num_rows`` (None: all) rows of :func:`dct_matrix` in float64: the lowest frequencies.

    >>> dct_rows(4, 2).shape
    torch.Size([2, 4])
    """
    return dct_matrix(n, torch.float64)[:num_rows].clone()
