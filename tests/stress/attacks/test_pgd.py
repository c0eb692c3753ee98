from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitkit.errors import BadInput
from vitkit.stress.attacks import fgsm, pgd
from vitkit.stress.attacks.projection import size


@given(
    norm=st.sampled_from(["linf", "l2"]),
    epsilon=st.floats(0, 2),
    step_size=st.floats(0, 1),
    steps=st.integers(1, 4),
    random_start=st.booleans(),
    seed=st.integers(0, 99),
)
def test_stays_in_ball_and_range(make_linear, norm, epsilon, step_size, steps, random_start, seed):
    model = make_linear(num_classes=3)
    x = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    y = torch.tensor([0, 1, 2, 0])
    result = pgd(
        model,
        x,
        y,
        epsilon=epsilon,
        step_size=step_size,
        steps=steps,
        norm=norm,
        random_start=random_start,
        generator=torch.Generator().manual_seed(seed),
    )
    assert (size(result.x_adv - x, norm) <= epsilon + 1e-5).all()
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finds_the_optimum_of_a_linear_model(make_linear, norm):
    model = make_linear(num_classes=2)
    x, y = torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 1])
    w = (model.fc.weight[1] - model.fc.weight[0]).detach().view(1, 4, 4)
    best = 0.2 * (w.sign() if norm == "linf" else w / w.norm())
    # the gradient of a linear model is constant, so every start ends in the corner (linf) or near the pole (l2)
    result = pgd(model, x, y, epsilon=0.2, step_size=0.05, steps=60, norm=norm)
    torch.testing.assert_close(result.x_adv, x + torch.stack([best, -best]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_steps_and_more_restarts_are_at_least_as_strong(digits_cnn, norm):
    model, x, y = digits_cnn
    settings = {"epsilon": 0.06, "step_size": 0.02} if norm == "linf" else {"epsilon": 0.4, "step_size": 0.1}
    before, won = torch.zeros(len(x), dtype=torch.bool), []
    for steps in (1, 3, 10, 20):
        result = pgd(model, x, y, norm=norm, steps=steps, **settings)
        assert (result.success >= before).all()
        before = result.success
        won.append(int(before.sum()))
    assert won[-1] > won[0]
    more = pgd(model, x, y, norm=norm, steps=20, restarts=3, **settings)
    assert (more.success >= before).all()


def test_is_at_least_as_strong_as_fgsm_on_the_whole(digits_cnn):
    model, x, y = digits_cnn
    strong = pgd(model, x, y, epsilon=0.06, step_size=0.015, steps=20).success.sum()
    assert strong >= fgsm(model, x, y, epsilon=0.06).success.sum()


def test_more_steps_on_the_same_images_raise_the_score(digits_cnn):
    """Among failures too the returned iterate is the best one."""
    model, x, y = digits_cnn
    few, many = (pgd(model, x, y, epsilon=0.02, step_size=0.01, steps=n, random_start=False) for n in (2, 8))
    both = few.success == many.success
    assert (many.log["confidence_label"][both] <= few.log["confidence_label"][both] + 1e-6).all()


def test_early_stop_finds_the_same_successes_for_less(digits_cnn):
    model, x, y = digits_cnn
    full = pgd(model, x, y, epsilon=0.08, steps=12, restarts=2)
    stopped = pgd(model, x, y, epsilon=0.08, steps=12, restarts=2, early_stop=True)
    assert torch.equal(full.success, stopped.success)
    assert stopped.queries.sum() < full.queries.sum() and stopped.num_iter.sum() < full.num_iter.sum()
    assert (full.num_iter == 24).all() and (full.queries == 1 + 2 * 13).all()
    with torch.no_grad():
        assert torch.equal(model(stopped.x_adv).argmax(1) != y, stopped.success)


def test_targeted_reaches_the_target(digits_cnn):
    model, x, y = digits_cnn
    target = (y + 1) % 10
    result = pgd(model, x, y, target=target, epsilon=3.0, step_size=0.5, steps=30, norm="l2")
    assert result.success.float().mean() > 0.9
    assert torch.equal(result.log["predicted"] == target, result.success)
    assert torch.equal(result.log["target"], target)


def test_epsilon_zero_is_the_clean_image(digits_cnn):
    model, x, y = digits_cnn
    for norm in ("linf", "l2"):
        assert torch.equal(pgd(model, x, y, epsilon=0.0, norm=norm).x_adv, x)


def test_breaks_a_model_that_is_certain(make_linear):
    """Logits so large that softmax is one-hot in float32: cross-entropy has no gradient there."""
    model = make_linear(num_classes=3, scale=300.0)
    x = torch.full((1, 1, 4, 4), 0.5)
    y = model(x).argmax(1)
    assert model(x).softmax(1).max() == 1
    assert pgd(model, x, y, epsilon=0.5, step_size=0.1, steps=10).success.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -0.1}, "epsilon=-0.1"),
        ({"step_size": float("nan")}, "step_size=nan"),
        ({"steps": 0}, "steps=0"),
        ({"restarts": 2, "random_start": False}, "random_start=True"),
        ({"norm": "l1"}, "'linf' or 'l2'"),
    ],
)
def test_bad_settings_are_refused(digits_cnn, options, message):
    model, x, y = digits_cnn
    with pytest.raises(BadInput, match=message):
        pgd(model, x, y, **options)
