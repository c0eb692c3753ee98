"""How much like a tree distances between features are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitkit.errors import BadInput

# n points · four of them have three sums of opposite distances, S₁ ≥ S₂ ≥ S₃

Metric = Literal["euclidean", "precomputed"] | Callable[[Tensor, Tensor], Tensor]

# quadruples compared at once
_AT_ONCE = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Hyperbolicity:
    """What :func:`delta_hyperbolicity` found.

    Attributes:
        delta: δ, in units of the distances; 0 for a tree. relative: 2δ/diameter, in [0, 1].
        diameter: largest distance among the points.
        exact: all quadruples were looked at; else δ is a lower bound.
        quadruples: how many were.
    """

    delta: float
    relative: float
    diameter: float
    exact: bool
    quadruples: int


@torch.no_grad()
def delta_hyperbolicity(
    points: Tensor,
    metric: Metric = "euclidean",
    max_exact: int = 64,
    samples: int = 200_000,
    max_points: int = 4096,
    seed: int = 0,
) -> Hyperbolicity:
    """Gromov's δ by the four-point condition: the largest ``(S₁ − S₂)/2`` over four points.

    Of the sums ``d(x,y) + d(z,w)``, ``d(x,z) + d(y,w)`` and ``d(x,w) + d(y,z)`` the two larger ones are equal in a
    tree. The relative value 2δ/diameter is 0 for a tree, and 1 where nothing is like one.

    >>> corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> round(delta_hyperbolicity(corners).relative, 4)
    0.5858

    Args:
        points: features (n, D), n ≥ 4; with ``metric="precomputed"`` the distances (n, n).
        metric: "euclidean", "precomputed", or a function of (n, D) and (m, D) that returns (n, m), such as
            :func:`vitkit.models.lorentz.manifold.pairwise_distance` with its c filled in.
        max_exact: up to so many points all quadruples are compared (64 points have 635,376).
        samples: beyond that, quadruples drawn at random; δ is then a lower bound.
        max_points: of more points than that, so many are drawn first.
        seed: of the draws; torch's own state is left alone.

    Returns: :class:`Hyperbolicity`, computed in float64.

    Raises: BadInput if there are fewer than four points, or distances that are no square, negative or not finite.
    Paper: Gromov, Hyperbolic Groups (1987); reported for images by Khrulkov et al., arXiv:1904.02239, and part of
        HyperCore, arXiv:2504.08912.
    Departs from the paper: every point may be the base point, where Khrulkov et al. fix one, which can miss half of δ.
    """
    if points.ndim != 2 or len(points) < 4:
        raise BadInput(f"δ compares four points; got a tensor {tuple(points.shape)}, needed is (n, D) with n ≥ 4.")
    if metric == "precomputed" and points.shape[0] != points.shape[1]:
        raise BadInput(f"Distances must be a square (n, n); got {tuple(points.shape)}. Features need another metric.")
    if samples < 1 or max_points < 4:
        raise BadInput(f"samples={samples} and max_points={max_points} must be at least 1 and 4.")
    generator = torch.Generator().manual_seed(seed)
    total = len(points)
    if total > max_points:
        chosen = torch.randperm(len(points), generator=generator)[:max_points].to(points.device)
        points = points[chosen][:, chosen] if metric == "precomputed" else points[chosen]
    distances = _distances(points.detach().double(), metric)
    num = len(distances)
    parts = _all_of(num) if num <= max_exact else iter([_draw(num, samples, generator)])
    delta, quadruples = 0.0, 0
    for four in (slab for part in parts for slab in part.split(_AT_ONCE)):
        delta = max(delta, float(_gap(distances, four.to(distances.device)).max()) / 2)
        quadruples += len(four)
    diameter = float(distances.max())
    return Hyperbolicity(
        delta=delta,
        relative=2 * delta / diameter if diameter > 0 else 0.0,
        diameter=diameter,
        exact=num == total and num <= max_exact,
        quadruples=quadruples,
    )


def _distances(points: Tensor, metric: Metric) -> Tensor:
    if metric == "precomputed":
        found = points
    elif metric == "euclidean":
        # by differences: the product form loses what is small beside the norms
        found = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    elif callable(metric):
        found = metric(points, points).double()
    else:
        raise BadInput(f"metric={metric!r} must be 'euclidean', 'precomputed' or a function of two sets of points.")
    if not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
        raise BadInput("The distances hold negative, NaN or infinite values; δ is defined for a metric.")
    return found


def _all_of(num: int) -> Iterator[Tensor]:
    """All quadruples of ``num`` points, those with one first point at a time, as there are many."""
    for first in range(num - 3):
        rest = torch.combinations(torch.arange(first + 1, num), 3)
        yield torch.cat([torch.full((len(rest), 1), first), rest], 1)


def _draw(num: int, samples: int, generator: torch.Generator) -> Tensor:
    """(samples, 4) numbers of points, no two of a row the same."""
    # each next number skips those before it, so that all ordered draws are equally likely
    raw = torch.stack([torch.randint(num - i, (samples,), generator=generator) for i in range(4)], 1)
    four = raw[:, :1]
    for i in range(1, 4):
        new = raw[:, i : i + 1]
        for taken in four.sort(1).values.unbind(1):
            new = new + (new >= taken.unsqueeze(1)).long()
        four = torch.cat([four, new], 1)
    return four


def _gap(distances: Tensor, four: Tensor) -> Tensor:
    """S₁ − S₂ of every row."""
    x, y, z, w = four.unbind(1)
    sums = torch.stack(
        [
            distances[x, y] + distances[z, w],
            distances[x, z] + distances[y, w],
            distances[x, w] + distances[y, z],
        ],
        1,
    )
    return sums.topk(2, dim=1).values.diff(dim=1).neg()[:, 0]
