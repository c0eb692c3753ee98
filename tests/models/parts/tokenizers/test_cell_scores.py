from __future__ import annotations

import math

import pytest
import torch

from vitkit.models.parts.tokenizers.cell_scores import entropy, frequency, gradient


@pytest.mark.parametrize("score", [frequency, gradient, entropy])
def test_flat_scores_lowest_and_shapes_fit(score):
    torch.manual_seed(0)
    cells = torch.full((2, 3, 8, 8), 0.3)
    cells[:, 1] += 0.5 * torch.rand(8, 8)
    cells[:, 2] += 0.1 * torch.linspace(0, 1, 8)
    found = score(cells)
    assert found.shape == (2, 3)
    assert (found.argmax(1) == 1).all()
    assert (found.argmin(1) == 0).all()
    assert found.isfinite().all()


def test_gradient_of_a_ramp():
    # Sobel of a slope of 1 per pixel is 8; the two border columns see half of it
    ramp = torch.arange(6.0).expand(1, 1, 6, 6)
    assert gradient(ramp).item() == pytest.approx((4 * 64 + 2 * 16) / 6)
    assert gradient(ramp.mT).item() == pytest.approx((4 * 64 + 2 * 16) / 6)


def test_entropy_counts_levels():
    cells = torch.zeros(1, 2, 4, 4)
    cells[0, 0, :2] = 1
    cells[0, 1] = torch.arange(16.0).reshape(4, 4) / 15
    assert entropy(cells)[0].tolist() == pytest.approx([math.log(2), math.log(16)], rel=1e-5)
    assert entropy(torch.ones(1, 1, 4, 4)).item() == 0


def test_frequency_is_the_mean_log_magnitude():
    cells = torch.zeros(1, 1, 2, 2)
    cells[0, 0, 0, 0] = 3
    assert frequency(cells).item() == pytest.approx(math.log(4))
