from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.stress.attacks import carlini_wagner, et_deepfool


def test_finds_the_distance_to_the_boundary_of_a_linear_model(make_linear):
    model = make_linear(num_classes=2).double()
    x = 0.3 + 0.4 * torch.rand(12, 1, 4, 4, dtype=torch.float64)
    z = model(x).detach()
    w = model.fc.weight.detach()
    distance = (z[:, 0] - z[:, 1]).abs() / (w[0] - w[1]).norm()
    # pixels keep away from their bounds for these
    near = distance < 0.25
    assert near.sum() > 2
    result = carlini_wagner(model, x[near], steps=300, search_steps=8)
    assert result.success.all()
    assert (result.log["l2"] >= distance[near]).all()
    assert (result.log["l2"] <= 1.1 * distance[near] + 0.005).all()


def test_is_shorter_than_et_deepfool_on_the_same_targets(digits_cnn):
    model, x, y = digits_cnn
    x, y = x[:12], y[:12]
    target = (y + 1) % 10
    thorough = carlini_wagner(model, x, y, target=target)
    quick = et_deepfool(model, x, y, target=target, min_confidence=0)
    both = thorough.success & quick.success
    assert both.sum() > 6, (thorough.success, quick.success)
    assert thorough.log["l2"][both].median() <= quick.log["l2"][both].median()
    assert torch.equal(thorough.log["predicted"] == target, thorough.success)


def test_a_margin_is_kept(digits_cnn):
    model, x, y = digits_cnn
    result = carlini_wagner(model, x[:8], y[:8], margin=2.0, search_steps=3, steps=60)
    with torch.no_grad():
        z = model(result.x_adv)
    ahead = z.amax(1) - z.gather(1, y[:8, None])[:, 0]
    assert result.success.sum() > 4 and (ahead[result.success] >= 2 - 1e-4).all()


def test_images_as_wanted_already_stay(digits_cnn):
    model, x, _ = digits_cnn
    result = carlini_wagner(model, x[:4], target=model(x[:4]).argmax(1), steps=5, search_steps=2)
    assert result.success.all() and torch.equal(result.x_adv, x[:4])


def test_settings_out_of_range_are_refused(digits_cnn):
    model, x, y = digits_cnn
    for options in ({"margin": -1}, {"learning_rate": 0}, {"initial_weight": 0}, {"steps": 0}, {"search_steps": 0}):
        with pytest.raises(BadInput, match=next(iter(options))):
            carlini_wagner(model, x, y, **options)
