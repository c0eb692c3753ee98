"""The DCT matrix against scipy and against its own definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dct

from vitkit.errors import BadInput
from vitkit.models.dct import dct_matrix


@pytest.mark.parametrize("n", [1, 2, 3, 8, 64, 97, 192])
def test_is_orthonormal(n: int) -> None:
    d = dct_matrix(n, torch.float64)
    assert (d @ d.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, 2, 5, 64, 97])
def test_equals_scipy(n: int) -> None:
    x = np.random.default_rng(n).normal(size=(3, n))
    ours = torch.from_numpy(x) @ dct_matrix(n, torch.float64).T
    np.testing.assert_allclose(ours.numpy(), dct(x, type=2, norm="ortho", axis=-1), atol=1e-12)


def test_low_precision_is_rounded_only_once() -> None:
    assert dct_matrix(64, torch.bfloat16).dtype == torch.bfloat16
    torch.testing.assert_close(dct_matrix(64), dct_matrix(64, torch.float64).float(), rtol=0, atol=0)


def test_refuses_an_empty_transform() -> None:
    with pytest.raises(BadInput, match="at least one sample"):
        dct_matrix(0)
