"""Gromov's δ: zero for trees, known for cycles, bounded in hyperbolic space, equal to a slow loop."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.diagnostics.delta_hyperbolicity import delta_hyperbolicity
from vitkit.models.lorentz.manifold import lift, pairwise_distance


def tree_distances(num, seed=0):
    """Path lengths between the nodes of a random tree with edges of random length."""
    generator = torch.Generator().manual_seed(seed)
    distances = torch.zeros(num, num, dtype=torch.float64)
    for i in range(1, num):
        parent = int(torch.randint(i, (1,), generator=generator))
        edge = float(torch.rand(1, generator=generator)) + 0.1
        distances[i, :i] = distances[:i, i] = distances[parent, :i] + edge
    return distances


def slow(distances):
    """By Gromov products over every base point."""
    n, best = len(distances), 0.0
    for w, x, y, z in itertools.product(range(n), repeat=4):

        def near(a, b, w=w):
            return 0.5 * float(distances[a, w] + distances[b, w] - distances[a, b])

        best = max(best, min(near(x, y), near(y, z)) - near(x, z))
    return best


def test_it_is_gromovs_definition():
    points = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    found = delta_hyperbolicity(points)
    distances = torch.cdist(points.double(), points.double())
    assert found.delta == pytest.approx(slow(distances)) and found.exact and found.quadruples == math.comb(9, 4)
    assert found.diameter == pytest.approx(float(distances.max()))
    assert found.relative == pytest.approx(2 * found.delta / found.diameter)


def test_a_tree_has_none():
    found = delta_hyperbolicity(tree_distances(40), metric="precomputed")
    assert found.delta == pytest.approx(0, abs=1e-12) and found.relative == pytest.approx(0, abs=1e-12)


def test_a_cycle_of_four_has_all_of_it():
    cycle = torch.tensor([[0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 1], [1, 2, 1, 0]]).float()
    found = delta_hyperbolicity(cycle, metric="precomputed")
    assert found.delta == 1 and found.relative == 1


def test_hyperbolic_space_has_at_most_ln_2_and_grows_with_its_radius():
    generator = torch.Generator().manual_seed(0)
    space = torch.randn(60, 2, generator=generator, dtype=torch.float64) * 1e3
    for c in (1.0, 4.0):
        curved = delta_hyperbolicity(lift(space, c), partial(pairwise_distance, c=c))
        assert 0 < curved.delta <= c**0.5 * math.log(2) + 1e-6
    assert curved.relative < 0.2 < delta_hyperbolicity(space).relative


def test_samples_are_a_lower_bound_that_comes_near():
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    exact = delta_hyperbolicity(points)
    sampled = delta_hyperbolicity(points, max_exact=10, samples=50_000)
    assert not sampled.exact and sampled.quadruples == 50_000
    assert 0.8 * exact.delta < sampled.delta <= exact.delta + 1e-12
    few = delta_hyperbolicity(points, max_points=20)
    assert not few.exact and few.quadruples == math.comb(20, 4) and few.delta <= exact.delta + 1e-12


def test_samples_are_four_different_points_drawn_evenly_and_torch_is_left_alone():
    from vitkit.models.diagnostics.delta_hyperbolicity import _draw

    four = _draw(5, 40_000, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 4 for row in four[:500].tolist()) and (four.sort(1).values.diff(dim=1) > 0).all()
    shares = torch.stack([torch.bincount(column, minlength=5) for column in four.unbind(1)]) / 40_000
    assert torch.allclose(shares, torch.tensor(0.2), atol=0.01)
    state = torch.get_rng_state()
    points = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    assert delta_hyperbolicity(points, samples=100) == delta_hyperbolicity(points, samples=100)
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_points_and_wrong_input():
    assert delta_hyperbolicity(torch.ones(6, 3)).relative == 0
    for wrong, metric, word in (
        (torch.randn(3, 4), "euclidean", "n ≥ 4"),
        (torch.rand(5, 4), "precomputed", "square"),
        (torch.full((5, 5), float("nan")), "precomputed", "NaN"),
        (torch.randn(5, 4), "cosine", "metric='cosine'"),
    ):
        with pytest.raises(BadInput, match=word):
            delta_hyperbolicity(wrong, metric)
    with pytest.raises(BadInput, match="samples"):
        delta_hyperbolicity(torch.randn(5, 4), samples=0)
