"""The split by frequency: perfect reconstruction, and which path a frequency takes."""

from __future__ import annotations

import pytest
import torch

from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.wavelet_ssm import WaveletSSM, haar, inverse_haar


@pytest.mark.parametrize(("h", "w"), [(4, 6), (5, 7), (1, 1), (1, 8)])
def test_the_wavelet_is_undone(h, w):
    maps = torch.randn(2, 3, h, w, dtype=torch.float64)
    low, high = haar(maps)
    assert low.shape == (2, 3, (h + 1) // 2, (w + 1) // 2) and high.shape[1] == 9
    assert torch.allclose(inverse_haar(low, high)[..., :h, :w], maps, atol=1e-12)
    if h % 2 == w % 2 == 0:
        assert torch.allclose(low.square().sum() + high.square().sum(), maps.square().sum())


def test_what_is_flat_goes_low_and_what_alternates_goes_high():
    low, high = haar(torch.ones(1, 1, 4, 4))
    assert bool((low == 2).all()) and bool((high == 0).all())
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    for k, pattern in enumerate((columns, rows, rows + columns)):
        low, high = haar((1.0 - 2 * (pattern % 2)).expand(1, 1, 4, 4))
        assert bool((low == 0).all()) and high[0, k].abs().min() == 2
        assert sum(float(high[0, j].abs().max()) for j in range(3)) == 2


def test_sharp_patterns_do_not_reach_the_scan():
    mixer = WaveletSSM(8, num_prefix=0)
    layout = TokenLayout(grid=(4, 6))
    stripes = (1.0 - 2 * (torch.arange(24) % 2)).reshape(1, 24, 1).expand(1, 24, 8)
    seen = []
    mixer.low.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    mixer(stripes, layout)
    mixer(torch.ones(1, 24, 8), layout)
    assert float(seen[0].abs().max()) == 0 and bool((seen[1] == 2).all())
    assert seen[0].shape == (1, 6, 8), "a quarter of the tokens"


def test_without_any_change_of_bands_it_is_its_linear_layer():
    mixer = WaveletSSM(8, num_prefix=0)
    mixer.low.forward = lambda x, layout: x
    mixer.high = torch.nn.Identity()
    x = torch.randn(2, 35, 8)
    assert torch.allclose(mixer(x, TokenLayout(grid=(5, 7))), mixer.proj(x), atol=1e-5)
