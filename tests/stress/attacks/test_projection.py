from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitkit.errors import BadInput
from vitkit.stress.attacks.projection import (
    assert_allowed,
    into_ball_and_range,
    project,
    random_in_ball,
    random_of_norm,
    size,
    steepest,
)

norms = st.sampled_from(["linf", "l2"])
epsilons = st.floats(0, 3)


@given(norm=norms, epsilon=epsilons, scale=st.floats(0, 10), seed=st.integers(0, 99))
def test_projection_lands_in_the_ball_and_the_range(norm, epsilon, scale, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 2, 4, 5, generator=g)
    x_adv = into_ball_and_range(x + scale * torch.randn(x.shape, generator=g), x, epsilon, norm)
    assert (size(x_adv - x, norm) <= epsilon + 1e-5).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert_allowed(x_adv, x, epsilon, norm)


@given(norm=norms, epsilon=st.floats(0.01, 3), seed=st.integers(0, 99))
def test_projection_is_idempotent_and_the_nearest_point(norm, epsilon, seed):
    g = torch.Generator().manual_seed(seed)
    delta = 2 * torch.randn(2, 1, 3, 3, generator=g, dtype=torch.float64)
    found = project(delta, epsilon, norm)
    torch.testing.assert_close(project(found, epsilon, norm), found)
    inside = size(delta, norm) <= epsilon
    torch.testing.assert_close(found[inside], delta[inside])
    # no other point of the ball is nearer in Euclidean distance
    other = project(torch.randn(delta.shape, generator=g, dtype=torch.float64), epsilon, norm)
    assert (size(delta - found, "l2") <= size(delta - other, "l2") + 1e-12).all()


def test_projection_takes_a_radius_for_each_image():
    radii = torch.tensor([0.1, 0.5, 2.0])
    torch.testing.assert_close(size(project(torch.ones(3, 1, 2, 2), radii, "l2"), "l2"), radii)


@given(norm=norms, exponent=st.integers(-30, 30))
def test_steepest_has_unit_norm_at_every_scale_and_is_zero_for_zero(norm, exponent):
    grad = torch.randn(2, 1, 3, 3) * 10.0**exponent
    torch.testing.assert_close(size(steepest(grad, norm), norm), torch.ones(2))
    assert not steepest(torch.zeros(1, 1, 2, 2), norm).any()


def test_random_starts_fill_the_ball_evenly():
    g = torch.Generator().manual_seed(0)
    like = torch.zeros(4000, 1, 1, 2)
    drawn = size(random_in_ball(like, 2.0, "l2", g), "l2") / 2
    assert drawn.max() <= 1 + 1e-6
    # in two dimensions the share within radius ρ is ρ²
    assert abs((drawn <= 0.5).float().mean() - 0.25) < 0.03
    flat = random_in_ball(like, 2.0, "linf", g)
    assert flat.abs().max() <= 2 and abs((flat.abs() <= 1).float().mean() - 0.5) < 0.03


@given(norm=norms, epsilon=epsilons)
def test_control_noise_has_exactly_the_norm(norm, epsilon):
    noise = random_of_norm(torch.zeros(2, 3, 4, 4), epsilon, norm, torch.Generator().manual_seed(1))
    torch.testing.assert_close(size(noise, norm), torch.full((2,), epsilon), rtol=1e-5, atol=1e-6)


def test_what_is_not_allowed_is_refused():
    x = torch.full((1, 1, 2, 2), 0.5)
    with pytest.raises(RuntimeError, match="left its ball"):
        assert_allowed(x + 0.1, x, 0.05, "linf")
    with pytest.raises(RuntimeError, match="outside"):
        assert_allowed(x + 0.6, x, None, "linf")
    with pytest.raises(RuntimeError, match="NaN"):
        assert_allowed(x * float("nan"), x, None, "linf")
    with pytest.raises(BadInput, match="'linf' or 'l2'"):
        project(x, 0.1, "l1")
