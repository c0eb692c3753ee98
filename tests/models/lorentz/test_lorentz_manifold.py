"""The Lorentz model: identities, inverse maps, limits, and float32 at large norms."""

from __future__ import annotations

import math

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.lorentz import manifold as M


def points(*shape, c=1.0, size=1.0, seed=0, dtype=torch.float64):
    space = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * size
    return M.lift(space.to(dtype), c)


def on_the_sheet(x, c):
    return ((M.inner(x, x) + c).abs() <= 1e-4 * (c + x[..., 1:].square().sum(-1))).all()


@pytest.mark.parametrize("c", [0.3, 1.0, 25.0])
@pytest.mark.parametrize("size", [1e-4, 1.0, 125.0])
def test_points_stay_on_the_sheet_up_to_norms_of_a_thousand(c, size):
    x, y = (points(7, 64, c=c, size=size, seed=s, dtype=torch.float32) for s in (0, 1))
    assert size < 100 or x[:, 1:].norm(dim=1).max() > 1000
    found = [x, M.project(x * 1.1, c), M.centroid(x, c), M.from_mean(x.mean(0), c)]
    found += [M.from_poincare(M.to_poincare(y, c), c), M.exp_map(x, M.log_map(x, y, c), c)]
    for point in found:
        assert torch.isfinite(point).all() and on_the_sheet(point, c)
    assert on_the_sheet(M.change_curvature(x, c, 4.0), 4.0)
    for number in (M.squared_distance(x, y), M.distance(x, y, c), M.pairwise_distance(x, y, c)):
        assert torch.isfinite(number).all() and (number >= 0).all()


def test_products_and_distances_are_those_of_the_textbook():
    x, y, c = points(5, 3, c=2.0), points(5, 3, c=2.0, seed=1), 2.0
    for i in range(5):
        product = -float(x[i, 0] * y[i, 0]) + sum(float(x[i, k] * y[i, k]) for k in (1, 2, 3))
        assert float(M.inner(x, y)[i]) == pytest.approx(product)
        assert float(M.pairwise_inner(x, y)[i, i]) == pytest.approx(product)
        assert float(M.squared_distance(x, y)[i]) == pytest.approx(-2 * c - 2 * product)
        assert float(M.distance(x, y, c)[i]) == pytest.approx(math.sqrt(c) * math.acosh(-product / c))
        assert float(M.pairwise_distance(x, y, c)[i, i]) == pytest.approx(math.sqrt(c) * math.acosh(-product / c))
    assert (M.distance(x, x, c) == 0).all()


def test_distances_between_near_points_far_out_survive_float32():
    exact = points(1, 16, size=250.0)
    near = M.lift(exact[:, 1:] + 1e-2, 1.0)
    true = M.squared_distance(exact, near)
    single = M.squared_distance(exact.float(), near.float()).double()
    textbook = -2 - 2 * M.inner(exact.float(), near.float()).double()
    assert torch.allclose(single, true, rtol=0.1) and (textbook - true).abs() > 10 * (single - true).abs()


def test_distance_has_a_gradient_where_points_meet():
    x = points(3, 4).requires_grad_()
    M.distance(x, x.detach(), 1.0).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_the_centroid_of_equal_points_is_the_point():
    for size in (1.0, 125.0):
        x = points(4, 1, 64, size=size, dtype=torch.float32).expand(4, 9, 65)
        assert torch.allclose(M.centroid(x, 1.0), x[:, 0], rtol=1e-5)
        assert torch.allclose(M.centroid(x, 1.0, torch.rand(4, 9)), x[:, 0], rtol=1e-5)
    moderate = points(4, 8, dtype=torch.float32)
    assert torch.allclose(M.from_mean(moderate, 1.0), moderate, atol=1e-5)


def test_the_centroid_is_its_formula_and_the_minimum():
    x, c = points(6, 3, c=1.5), 1.5
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 0.5], dtype=torch.float64)
    mu = (weights[:, None] * x).sum(0)
    wanted = math.sqrt(c) * mu / M.inner(mu, mu).abs().sqrt()
    found = M.centroid(x, c, weights)
    assert torch.allclose(found, wanted) and torch.allclose(M.from_mean(mu / weights.sum(), c), wanted)

    def cost(m):
        return float((weights * M.squared_distance(x, m)).sum())

    for seed in range(5):
        other = M.lift(found[1:] + 0.05 * points(3, seed=seed)[1:], c)
        assert cost(other) > cost(found)


def test_log_inverts_exp_and_has_the_distance_as_its_length():
    x, y, c = points(6, 4, c=2.0), points(6, 4, c=2.0, seed=1), 2.0
    u = M.log_map(x, y, c)
    assert torch.allclose(M.inner(x, u), torch.zeros(6, dtype=u.dtype), atol=1e-10)
    assert torch.allclose(M.inner(u, u).sqrt(), M.distance(x, y, c))
    assert torch.allclose(M.exp_map(x, u, c), y)
    assert torch.allclose(M.exp_map(x, 0 * u, c), x) and M.log_map(x, x, c).abs().max() < 1e-12


def test_transport_keeps_products_and_tangents():
    x, y, c = points(6, 4, c=2.0), points(6, 4, c=2.0, seed=1), 2.0
    u, v = (M.to_tangent(x, torch.randn(6, 5, dtype=torch.float64), c) for _ in range(2))
    moved, other = M.transport(x, y, u, c), M.transport(x, y, v, c)
    assert torch.allclose(M.inner(y, moved), torch.zeros(6, dtype=u.dtype), atol=1e-9)
    assert torch.allclose(M.inner(moved, other), M.inner(u, v))
    # the geodesic's own direction stays its direction
    along = M.log_map(x, y, c)
    assert torch.allclose(M.transport(x, y, along, c), -M.log_map(y, x, c))


@pytest.mark.parametrize("c", [0.5, 1.0, 9.0])
def test_the_poincare_ball_and_back(c):
    x = points(20, 6, c=c, dtype=torch.float32)
    ball = M.to_poincare(x, c)
    assert (ball.norm(dim=1) < c**0.5).all()
    assert torch.allclose(M.from_poincare(ball, c), x, rtol=1e-5, atol=1e-5)
    # the ball's own formula for distances
    p, q = M.to_poincare(points(2, 6, c=c), c) / c**0.5
    ratio = (p - q).square().sum() / ((1 - p.square().sum()) * (1 - q.square().sum()))
    a, b = points(2, 6, c=c)
    assert float(M.distance(a, b, c)) == pytest.approx(float(c**0.5 * torch.acosh(1 + 2 * ratio)))


def test_changing_the_curvature_scales_distances():
    x, y = points(5, 3), points(5, 3, seed=1)
    far = M.distance(M.change_curvature(x, 1.0, 9.0), M.change_curvature(y, 1.0, 9.0), 9.0)
    assert torch.allclose(far, 3 * M.distance(x, y, 1.0))


def test_flat_space_is_the_limit():
    x, y = points(5, 4, c=1e4), points(5, 4, c=1e4, seed=1)
    flat = (x - y)[:, 1:].square().sum(1)
    assert torch.allclose(-2e4 - 2 * M.inner(x, y), flat, rtol=1e-3)
    assert torch.allclose(M.distance(x, y, 1e4), flat.sqrt(), rtol=1e-3)


def test_a_learned_curvature_starts_where_it_should_and_stays_positive():
    for c in (0.01, 1.0, 50.0):
        learned = M.Curvature(c, learned=True)
        assert float(learned().detach()) == pytest.approx(c, rel=1e-4) and M.Curvature(c)() == c
        with torch.no_grad():
            learned.raw.fill_(-5.0)
        assert float(learned().detach()) > 0
    with pytest.raises(BadInput, match="positive"):
        M.Curvature(0.0)


def test_half_precision_is_lifted_in_float32():
    x = M.lift(torch.randn(4, 64).bfloat16() * 30, 1.0)
    assert x.dtype == torch.float32 and on_the_sheet(x, 1.0)
