"""Convolution beside scan."""

from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.conv_ssm import ConvSSM

LAYOUT = TokenLayout(grid=(5, 7), prefix=(("class", 1),))


def test_one_half_sees_neighbours_and_the_other_everything():
    mixer = ConvSSM(8)
    with torch.no_grad():
        mixer.proj.weight.copy_(torch.eye(8))
    x = torch.randn(1, 36, 8, requires_grad=True)
    out = mixer(x, LAYOUT)
    out[0, 1 + 16, :4].sum().backward()  # the cell in row 2, column 2
    near = set((x.grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist())
    assert near == {1 + r * 7 + c for r in (1, 2, 3) for c in (1, 2, 3)}
    x.grad = None
    mixer(x, LAYOUT)[0, 1 + 16, 4:].sum().backward()
    assert bool((x.grad[0, 1:, 4:].abs().sum(-1) > 0).all()) and float(x.grad[0, :, :4].abs().max()) == 0


def test_halves_are_the_modules_themselves():
    mixer, x = ConvSSM(8, kernel=5), torch.randn(2, 36, 8)
    with torch.no_grad():
        cells = mixer.conv(x[:, 1:, :4].transpose(1, 2).reshape(2, 4, 5, 7)).flatten(2).transpose(1, 2)
        near = mixer.point(torch.nn.functional.gelu(torch.cat([x[:, :1, :4], cells], 1)))
        both = mixer.proj(torch.cat([near, mixer.scan(x[..., 4:], LAYOUT)], -1))
        assert torch.allclose(mixer(x, LAYOUT), both, atol=1e-6)


def test_odd_widths_and_even_kernels_are_refused():
    with pytest.raises(BadInput, match="dim=7"):
        ConvSSM(7)
    with pytest.raises(BadInput, match="kernel=2"):
        ConvSSM(8, kernel=2)
