from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vitkit.deploy.resampling import cubic, resampling_weights, triangle

sides = st.integers(1, 30)


@pytest.mark.parametrize(("kernel", "mode"), [(triangle, "bilinear"), (cubic, "bicubic")])
@settings(deadline=None, max_examples=40)
@given(old=sides, new=sides)
def test_it_is_pytorchs_antialiased_resizing(kernel, mode, old, new):
    x = torch.rand(1, 2, old, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(old))
    step = torch.tensor([old / new], dtype=torch.float64)
    weights = resampling_weights(torch.arange(old).double(), torch.arange(new).double(), step, kernel)
    expected = F.interpolate(x, (new, 5), mode=mode, antialias=True, align_corners=False)
    torch.testing.assert_close(weights @ x, expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("kernel", [triangle, cubic])
def test_the_same_size_is_the_identity(kernel):
    places = torch.arange(7).float()
    assert torch.equal(resampling_weights(places, places, torch.ones(1), kernel), torch.eye(7))
