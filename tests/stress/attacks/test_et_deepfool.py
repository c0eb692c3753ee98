from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitkit.errors import BadInput
from vitkit.stress.attacks import et_deepfool


def distance(model, x, target):
    z = model(x)
    w = model.fc.weight[target] - model.fc.weight[1 - target]
    gap = z[:, target] - z[:, 1 - target]
    return (gap.abs() / w.norm()).detach()


@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize("overshoot", [0.0, 0.02, 0.5])
def test_one_step_crosses_the_boundary_of_a_linear_model(make_linear, official, overshoot):
    model = make_linear(num_classes=2).double()
    x = torch.rand(32, 1, 4, 4, dtype=torch.float64)
    x = x[model(x).argmax(1) == 0]
    assert len(x) > 3
    result = et_deepfool(
        model, x, target=1, min_confidence=0, clamp=False, overshoot=overshoot, official_overshoot=official
    )
    assert result.success.all() and (result.num_iter == 1).all()
    expected = (distance(model, x, 1) + 1e-4) * (1 + overshoot) ** (2 if official else 1)
    torch.testing.assert_close(result.log["l2"], expected)
    w = (model.fc.weight[1] - model.fc.weight[0]).detach().view(1, 1, 4, 4)
    torch.testing.assert_close(result.x_adv - x, expected.view(-1, 1, 1, 1) * w / w.norm())


def test_confidence_zero_stops_as_soon_as_the_target_wins(digits_cnn):
    model, x, y = digits_cnn
    result = et_deepfool(model, x, y, min_confidence=0)
    # one step fewer had not reached the target: a shorter cap fails for exactly those that used all steps
    last = int(result.num_iter[result.success].max())
    capped = et_deepfool(model, x, y, min_confidence=0, max_iter=last - 1)
    assert torch.equal(capped.success, result.success & (result.num_iter < last))
    assert (result.log["predicted"] == result.log["target"])[result.success].all()


@given(low=st.floats(0, 0.98), step=st.floats(0, 0.5), official=st.booleans(), seed=st.integers(0, 20))
def test_higher_confidence_is_never_nearer_on_a_linear_model(make_linear, low, step, official, seed):
    model = make_linear(num_classes=2, seed=seed).double()
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    high = min(low + step, 0.99)
    near, far = (
        et_deepfool(model, x, target=1, min_confidence=c, clamp=False, official_overshoot=official) for c in (low, high)
    )
    assert near.success.all() and far.success.all()
    assert (far.log["l2"] >= near.log["l2"] - 1e-12).all()
    assert (far.log["confidence_target"] >= high).all()


@pytest.mark.parametrize("reference", ["initial", "runner_up"])
@pytest.mark.parametrize("confidence", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("clamp", [True, False])
def test_success_means_the_target_at_the_demanded_confidence(digits_cnn, reference, confidence, clamp):
    model, x, y = digits_cnn
    result = et_deepfool(model, x, y, min_confidence=confidence, reference=reference, clamp=clamp, max_iter=40)
    assert result.success.any()
    reached = (result.log["predicted"] == result.log["target"]) & (result.log["confidence_target"] >= confidence)
    assert torch.equal(result.success, reached)
    assert (result.num_iter[~result.success & ~result.log["stuck"]] == 40).all()
    assert (result.queries == result.num_iter + 2).all()
    if clamp:
        assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1


def test_images_already_seen_as_the_target_stay(digits_cnn):
    model, x, y = digits_cnn
    with torch.no_grad():
        top = model(x).softmax(1).max(1)
    result = et_deepfool(model, x, y, target=top.indices, min_confidence=0.9)
    sure = top.values >= 0.9
    assert sure.any() and (~sure).any()
    assert torch.equal(result.x_adv[sure], x[sure])
    assert result.success[sure].all() and not result.num_iter[sure].any()
    # the others are pushed against their runner-up until the model is sure
    assert (result.num_iter[~sure] > 0).all() and result.success[~sure].double().mean() > 0.8
    assert (result.log["confidence_target"][~sure & result.success] >= 0.9).all()


def test_agrees_with_the_equation_one_image_at_a_time(digits_cnn):
    """A slow loop over images with two backward passes a step, in double precision."""
    import copy

    model, x, _ = digits_cnn
    model, x = copy.deepcopy(model).double(), x[:6].double()
    target = (model(x).argmax(1) + 3) % 10
    result = et_deepfool(model, x, target=target, min_confidence=0.8, max_iter=15)
    for i in range(len(x)):
        start = x[i : i + 1]
        k, t = int(model(start).argmax()), int(target[i])
        r, at, steps = torch.zeros_like(start), start, 0
        while steps < 15 and (model(at).argmax() != t or model(at).softmax(1)[0, t] < 0.8):
            grads = []
            for j in (t, k):
                leaf = at.detach().requires_grad_()
                model(leaf)[0, j].backward()
                grads.append(leaf.grad)
            w = grads[0] - grads[1]
            z = model(at).detach()[0]
            r = r + 1.02 * ((z[t] - z[k]).abs() / w.norm() + 1e-4) * w / w.norm()
            at, steps = (start + 1.02 * r).clamp(0, 1), steps + 1
        assert steps == result.num_iter[i]
        torch.testing.assert_close(result.x_adv[i : i + 1], at.detach(), rtol=1e-6, atol=1e-8)
    for p in digits_cnn[0].parameters():
        p.grad = None


def test_runner_up_follows_the_strongest_rival(make_linear):
    """Three classes: against the initial class alone the third stays on top; against the runner-up it is passed."""
    model = make_linear(shape=(1, 1, 2), num_classes=3).double()
    with torch.no_grad():
        # target 1 and rival 2 rise together against class 0; only the second pixel tells them apart
        model.fc.weight.copy_(torch.tensor([[0.0, 0.0], [4.0, 0.0], [4.0, -1.0]]))
        model.fc.bias.copy_(torch.tensor([3.0, 0.0, 0.5]))
    x = torch.full((1, 1, 1, 2), 0.25, dtype=torch.float64)
    assert model(x).argmax() == 0
    initial, other = (
        et_deepfool(model, x, target=1, min_confidence=0, max_iter=20, clamp=False, reference=r)
        for r in ("initial", "runner_up")
    )
    assert not initial.success and other.success


def test_a_flat_model_is_stuck_not_wrong():
    class Flat(nn.Module):
        def forward(self, images):
            return torch.tensor([1.0, 0.0]) + 0 * images.flatten(1).sum(1, keepdim=True)

    x = torch.rand(3, 1, 4, 4)
    result = et_deepfool(Flat(), x, target=torch.tensor([1, 1, 0]), min_confidence=0.5)
    assert result.log["stuck"].tolist() == [True, True, False]
    assert result.success.tolist() == [False, False, True]
    assert torch.equal(result.x_adv, x) and not result.num_iter.any()


def test_random_targets_are_never_the_prediction_and_cover_the_rest(make_linear):
    model = make_linear(num_classes=4)
    x = torch.rand(400, 1, 4, 4)
    result = et_deepfool(model, x, min_confidence=0, max_iter=1)
    offset = (result.log["target"] - result.log["predicted_clean"]) % 4
    assert torch.bincount(offset, minlength=4)[0] == 0
    assert (torch.bincount(offset, minlength=4)[1:] > 90).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_confidence": 1.0}, "min_confidence=1.0"),
        ({"min_confidence": -0.1}, "min_confidence=-0.1"),
        ({"overshoot": -1}, "overshoot=-1"),
        ({"max_iter": 0}, "max_iter=0"),
        ({"reference": "best"}, "'initial' or 'runner_up'"),
        ({"target": 12}, "the model has 10"),
    ],
)
def test_settings_out_of_range_are_refused(digits_cnn, options, message):
    model, x, y = digits_cnn
    with pytest.raises(BadInput, match=message):
        et_deepfool(model, x, y, **options)
