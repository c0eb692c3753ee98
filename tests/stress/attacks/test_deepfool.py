from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.stress.attacks import deepfool, et_deepfool


def test_goes_to_the_nearest_boundary_of_a_linear_model(make_linear):
    model = make_linear(num_classes=5).double()
    x = torch.rand(16, 1, 4, 4, dtype=torch.float64)
    result = deepfool(model, x, clamp=False, overshoot=0.1)
    z, weight = model(x).detach(), model.fc.weight.detach()
    k = z.argmax(1)
    gaps = (z.gather(1, k[:, None]) - z).abs() / (weight[k][:, None] - weight[None]).norm(dim=2)
    gaps.scatter_(1, k[:, None], float("inf"))
    nearest = gaps.min(1)
    assert result.success.all() and (result.num_iter == 1).all()
    torch.testing.assert_close(result.log["l2"], (nearest.values + 1e-4) * 1.1)
    assert torch.equal(result.log["predicted"], nearest.indices)


def test_leaves_its_class_within_the_range_and_is_shorter_than_a_chosen_class(digits_cnn):
    model, x, y = digits_cnn
    free = deepfool(model, x, y)
    assert free.success.all() and free.x_adv.min() >= 0 and free.x_adv.max() <= 1
    assert (free.log["predicted"] != free.log["predicted_clean"]).all()
    chosen = et_deepfool(model, x, y, min_confidence=0)
    both = chosen.success
    assert free.log["l2"][both].median() < chosen.log["l2"][both].median()


def test_images_answered_wrong_are_still_moved(digits_cnn):
    model, x, y = digits_cnn
    assert torch.equal(deepfool(model, x, (y + 1) % 10).x_adv, deepfool(model, x, y).x_adv)


def test_settings_out_of_range_are_refused(digits_cnn):
    model, x, y = digits_cnn
    for options in ({"overshoot": -0.1}, {"max_iter": 0}, {"num_candidates": 1}):
        with pytest.raises(BadInput, match=next(iter(options))):
            deepfool(model, x, y, **options)
