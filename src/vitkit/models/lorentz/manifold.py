"""Hyperbolic space as a sheet of a hyperboloid: the Lorentz model of curvature −1/c.

A point is ``x = (x_t, x_s)``, its time coordinate first, with ``⟨x, x⟩_L = −x_t² + ‖x_s‖² = −c`` and ``x_t > 0``. All
functions take points along the last axis, c as a number or a tensor without axes, and compute in float32 at least,
whatever the dtype of what they get. Where the textbook formula subtracts two large numbers, an equal one stands here
that does not: in float32 ``−2c − 2⟨x, y⟩_L`` is off by up to 0.75 at a spatial norm of 1,000.

Paper: HyperCore: The Core Framework for Building Hyperbolic Foundation Models with Comprehensive Modules,
    arXiv:2504.08912.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput

# D coordinates of a point, time first · c: the curvature is −1/c

Curved = float | Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def lift(space: Tensor, c: Curved) -> Tensor:
    """The point over a place: ``(√(‖x_s‖² + c), x_s)``.

    >>> lift(torch.tensor([3.0, 4.0]), 11.0)
    tensor([6., 3., 4.])

    Args:
        space: (…, D−1), any values.
        c: of the curvature −1/c, positive.

    Returns: (…, D), float32 at least.
    """
    space = wide(space)
    return torch.cat([(space.square().sum(-1, keepdim=True) + c).sqrt(), space], -1)


def project(x: Tensor, c: Curved) -> Tensor:
    """Back onto the sheet: the time coordinate is computed anew from the others. (…, D) → (…, D)."""
    return lift(x[..., 1:], c)


def change_curvature(x: Tensor, c: Curved, c_new: Curved) -> Tensor:
    """Points of curvature −1/c become points of −1/c': ``x·√(c'/c)``. Distances grow by the same factor."""
    return wide(x) * (c_new / c) ** 0.5


def inner(x: Tensor, y: Tensor) -> Tensor:
    """``⟨x, y⟩_L = −x_t y_t + x_s·y_s`` of (…, D) and (…, D) → (…)."""
    product = wide(x) * wide(y)
    return product[..., 1:].sum(-1) - product[..., 0]


def flip_time(x: Tensor) -> Tensor:
    """``(−x_t, x_s)``: the plain dot product with it is the Lorentz product."""
    return torch.cat([-x[..., :1], x[..., 1:]], -1)


def pairwise_inner(x: Tensor, y: Tensor) -> Tensor:
    """``⟨x_i, y_j⟩_L`` of all pairs by one matrix product: (…, n, D), (…, m, D) → (…, n, m)."""
    with torch.autocast(x.device.type, enabled=False):
        return flip_time(wide(x)) @ wide(y).transpose(-2, -1)


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared Lorentzian distance ``⟨x − y, x − y⟩_L = −2c − 2⟨x, y⟩_L ≥ 0``: (…, D), (…, D) → (…).

    Computed as ``‖d‖² − (d·(x_s + y_s) / (x_t + y_t))²`` with ``d = x_s − y_s``, which does not lose what is small
    beside the norms.
    """
    x, y = wide(x), wide(y)
    d = x[..., 1:] - y[..., 1:]
    time = (d * (x[..., 1:] + y[..., 1:])).sum(-1) / (x[..., 0] + y[..., 0])
    return (d.square().sum(-1) - time.square()).clamp_min(0)


def pairwise_squared_distance(x: Tensor, y: Tensor, c: Curved) -> Tensor:
    """``−2c − 2⟨x_i, y_j⟩_L`` of all pairs, at least 0: (…, n, D), (…, m, D) → (…, n, m).

    By a matrix product, so with its rounding: about 1e-6·x_t·y_t in float32.
    """
    return (-2 * c - 2 * pairwise_inner(x, y)).clamp_min(0)


def distance(x: Tensor, y: Tensor, c: Curved) -> Tensor:
    """Length of the shortest path: ``√c·arcosh(−⟨x, y⟩_L / c)`` of (…, D) and (…, D) → (…)."""
    return _arc(squared_distance(x, y), c)


def pairwise_distance(x: Tensor, y: Tensor, c: Curved) -> Tensor:
    """Lengths of the shortest paths between all pairs: (…, n, D), (…, m, D) → (…, n, m)."""
    return _arc(pairwise_squared_distance(x, y, c), c)


def centroid(x: Tensor, c: Curved, weights: Tensor | None = None) -> Tensor:
    """Lorentz centroid ``√c·μ/√|⟨μ, μ⟩_L|``, ``μ = Σ_j w_j x_j``: it minimises ``Σ_j w_j ⟨x_j − m, x_j − m⟩_L``.

    With m the point over the mean place and weights that sum to 1, ``−⟨μ, μ⟩_L = c + g(2m_t + g)`` where
    ``g = Σ_j w_j ⟨x_j − m, x_j − m⟩_L / 2m_t``; nothing small is lost that way in float32.

    Args:
        x: (…, N, D) points.
        c: of the curvature −1/c.
        weights: (…, N), not negative, not all zero; None: all equal.

    Returns: (…, D).
    """
    x = wide(x)
    if weights is None:
        share = torch.full(x.shape[:-1], 1 / x.shape[-2], dtype=x.dtype, device=x.device)
    else:
        weights = wide(weights)
        share = weights / weights.sum(-1, keepdim=True)
    middle = lift((share.unsqueeze(-1) * x[..., 1:]).sum(-2), c)
    time = middle[..., :1]
    gap = (share * squared_distance(x, middle.unsqueeze(-2))).sum(-1, keepdim=True) / (2 * time)
    return lift(middle[..., 1:] * (c / (c + gap * (2 * time + gap))) ** 0.5, c)


def from_mean(mean: Tensor, c: Curved) -> Tensor:
    """The centroid from a ready average μ of points, as a matrix product with attention weights gives it.

    ``−⟨μ, μ⟩_L ≥ c`` for weights that sum to 1; rounding beyond that bound is cut off. (…, D) → (…, D).
    """
    mean = wide(mean)
    size = torch.clamp(-inner(mean, mean).unsqueeze(-1), min=c)  # type: ignore[call-overload]
    return lift(mean[..., 1:] * (c / size) ** 0.5, c)


def exp_map(x: Tensor, u: Tensor, c: Curved) -> Tensor:
    """Walk from x along the geodesic that starts as u: ``cosh(r)x + sinh(r)/r·u``, ``r = √⟨u, u⟩_L / √c``.

    Args:
        x: (…, D) points. u: (…, D) tangent vectors at x (``⟨x, u⟩_L = 0``). c: of the curvature −1/c.
    """
    x, u = wide(x), wide(u)
    r = _sqrt(inner(u, u).clamp_min(0) / c).unsqueeze(-1)
    return lift(r.cosh() * x[..., 1:] + _sinhc(r) * u[..., 1:], c)


def log_map(x: Tensor, y: Tensor, c: Curved) -> Tensor:
    """The tangent vector at x that leads to y in unit time; the inverse of :func:`exp_map`."""
    x, y = wide(x), wide(y)
    square = squared_distance(x, y).unsqueeze(-1)
    r = _arc(square, c) / c**0.5
    return (y - x - square / (2 * c) * x) / _sinhc(r)


def to_tangent(x: Tensor, u: Tensor, c: Curved) -> Tensor:
    """The part of u (…, D) that is tangent at x: ``u + ⟨x, u⟩_L/c·x``."""
    return u + inner(x, u).unsqueeze(-1) / c * x


def transport(x: Tensor, y: Tensor, u: Tensor, c: Curved) -> Tensor:
    """Tangent vectors u at x, carried to y along the geodesic: ``u + ⟨y, u⟩_L/(c − ⟨x, y⟩_L)·(x + y)``."""
    # −⟨x, y⟩_L = c + ⟨x − y, x − y⟩_L / 2
    share = inner(y, u) / (2 * c + squared_distance(x, y) / 2)
    return u + share.unsqueeze(-1) * (x + y)


def to_poincare(x: Tensor, c: Curved) -> Tensor:
    """Points as places in the Poincaré ball of radius √c: ``√c·x_s/(x_t + √c)``. (…, D) → (…, D−1)."""
    x = wide(x)
    return c**0.5 * x[..., 1:] / (x[..., :1] + c**0.5)


def from_poincare(p: Tensor, c: Curved) -> Tensor:
    """Places in the open ball of radius √c as points: ``x_s = 2p/(1 − ‖p‖²/c)``. (…, D−1) → (…, D)."""
    p = wide(p)
    return lift(2 * p / (1 - p.square().sum(-1, keepdim=True) / c), c)


class Curvature(nn.Module):
    """c of the curvature −1/c: fixed, or learned as ``softplus(raw)``.

    Args:
        c: positive; the larger, the flatter. learned: make it a parameter.

    Shape: no input → a number, or a tensor without axes where it is learned.
    Raises: BadInput if c is not positive.
    """

    def __init__(self, c: float = 1.0, learned: bool = False) -> None:
        super().__init__()
        if not 0 < c < float("inf"):
            raise BadInput(f"curvature={c} must be positive (c of the curvature −1/c), for example 1.0.")
        self.c, self.raw = float(c), None
        if learned:
            start = torch.tensor(float(c), dtype=torch.float64)
            self.raw = nn.Parameter((start + torch.log(-torch.expm1(-start))).float())

    def forward(self) -> Curved:
        return self.c if self.raw is None else F.softplus(wide(self.raw))

    def no_weight_decay(self) -> set[str]:
        return {"raw"} if self.raw is not None else set()


def _sqrt(x: Tensor) -> Tensor:
    """√x whose gradient at 0 is 0 instead of infinite."""
    zero = x <= 0
    return x.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _arc(square: Tensor, c: Curved) -> Tensor:
    """Length of the path from the squared chord: arcosh(1 + z) = 2 arsinh(√(z/2))."""
    return 2 * c**0.5 * torch.asinh(_sqrt(square) / (2 * c**0.5))


def _sinhc(r: Tensor) -> Tensor:
    """sinh(r)/r, 1 at r = 0."""
    small = r < 1e-3
    safe = r.masked_fill(small, 1)
    return torch.where(small, 1 + r.square() / 6, safe.sinh() / safe)
