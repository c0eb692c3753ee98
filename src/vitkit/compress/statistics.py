"""Second-order statistics of a layer's inputs, gathered batch by batch."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from vitkit.errors import BadInput

S = TypeVar("S", bound="_Mean")


class _Mean:
    """A running mean over images; partial results of disjoint images can be merged."""

    def __init__(self, num_features: int, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise BadInput(f"dtype={dtype}: statistics are kept in float32 or float64.")
        self.num_features, self.dtype = num_features, dtype
        self.count = 0.0
        self._mean: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """(n, n), the mean over all images so far."""
        if self._mean is None:
            raise BadInput("no images were given to this statistic yet.")
        return self._mean

    def merge(self: S, other: S) -> S:
        """Take in what ``other`` gathered on other images; returns self."""
        if type(other) is not type(self) or other.num_features != self.num_features:
            raise BadInput("only statistics of the same kind and width can be merged.")
        if other._mean is not None:
            self._add(other._mean.to(self.dtype) * other.count, other.count)
        return self

    def _rows(self, x: Tensor, weight: Tensor | None) -> tuple[Tensor, float]:
        """Rows (N, n) scaled by √weight, and the number of images they stand for."""
        if x.shape[-1] != self.num_features:
            raise BadInput(f"the statistic has {self.num_features} features, the batch {x.shape[-1]}.")
        rows = x.to(self.dtype)
        if weight is None:
            return rows.reshape(-1, self.num_features), float(x.shape[0])
        if weight.shape != x.shape[:1]:
            raise BadInput(f"weight has shape {tuple(weight.shape)}; one weight per image is ({x.shape[0]},).")
        scale = weight.to(self.dtype).sqrt().reshape(-1, *([1] * (x.ndim - 1)))
        return (rows * scale).reshape(-1, self.num_features), float(weight.sum())

    def _add(self, total: Tensor, count: float) -> None:
        if count <= 0:
            return
        if self._mean is None:
            self._mean = total / count
        else:
            # rescaling the old mean keeps the entries near one size, however many images come
            self._mean.mul_(self.count / (self.count + count)).add_(total, alpha=1 / (self.count + count))
        self.count += count


class Gram(_Mean):
    """``H = (factor/m) Σ_i w_i X_i X_iᵀ`` over m = Σ w_i images, each with any number of tokens.

    >>> gram = Gram(2)
    >>> _ = gram.update(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]))
    >>> gram.value
    tensor([[1., 2.],
            [2., 5.]])

    Args:
        num_features: n, the last axis of the batches.
        dtype: float32 or float64.
        factor: constant in front; 2 makes H the Hessian of the squared error.
    """

    def __init__(self, num_features: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> None:
        super().__init__(num_features, dtype)
        self.factor = factor

    def update(self, x: Tensor, weight: Tensor | None = None) -> Gram:
        """Add a batch (B, …, n); ``weight`` (B,) counts an image w times. Returns self."""
        rows, count = self._rows(x, weight)
        self._add(self.factor * (rows.T @ rows), count)
        return self


class CrossGram(_Mean):
    """``D = (factor/m) Σ_i w_i A_i B_iᵀ`` of two batches with matching tokens; arguments as in :class:`Gram`."""

    def __init__(self, num_features: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> None:
        super().__init__(num_features, dtype)
        self.factor = factor

    def update(self, a: Tensor, b: Tensor, weight: Tensor | None = None) -> CrossGram:
        """Add two batches (B, …, n) whose rows belong together; returns self."""
        if a.shape != b.shape:
            raise BadInput(f"the two streams have shapes {tuple(a.shape)} and {tuple(b.shape)}; tokens must match.")
        rows_a, count = self._rows(a, weight)
        rows_b, _ = self._rows(b, weight)
        self._add(self.factor * (rows_a.T @ rows_b), count)
        return self
