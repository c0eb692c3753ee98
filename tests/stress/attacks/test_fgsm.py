from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.stress.attacks import fgsm, pgd


def test_closed_form_on_a_linear_model(make_linear):
    model = make_linear(num_classes=2)
    x = torch.full((4, 1, 4, 4), 0.5)
    y = torch.tensor([0, 1, 0, 1])
    w = (model.fc.weight[1] - model.fc.weight[0]).detach().view(1, 4, 4)
    towards = torch.where(y.view(-1, 1, 1, 1) == 0, w, -w).sign()
    torch.testing.assert_close(fgsm(model, x, y, epsilon=0.1).x_adv, x + 0.1 * towards)
    torch.testing.assert_close(fgsm(model, x, y, target=1 - y, epsilon=0.1).x_adv, x + 0.1 * towards)


def test_is_one_step_of_pgd_without_random_start(digits_cnn):
    model, x, y = digits_cnn
    for target in (None, 3):
        one = fgsm(model, x, y, target=target, epsilon=0.1)
        same = pgd(model, x, y, target=target, epsilon=0.1, step_size=0.1, steps=1, random_start=False)
        torch.testing.assert_close(one.x_adv, same.x_adv, rtol=0, atol=1e-7)
        assert torch.equal(one.success, same.success)


def test_epsilon_zero_changes_nothing(digits_cnn):
    model, x, y = digits_cnn
    result = fgsm(model, x, y, epsilon=0.0)
    assert torch.equal(result.x_adv, x)
    assert torch.equal(result.success, model(x).argmax(1) != y)


def test_negative_epsilon_is_refused(digits_cnn):
    model, x, y = digits_cnn
    with pytest.raises(BadInput, match="epsilon=-1"):
        fgsm(model, x, y, epsilon=-1)
