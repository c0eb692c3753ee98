"""The mixer decomposed-conv: which tokens it mixes, on planes and volumes, and its prefix tokens."""

from __future__ import annotations

import pytest
import torch

import vitkit
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.decomposed_conv import DecomposedConv


def test_a_patch_sees_its_row_and_column():
    torch.manual_seed(0)
    mixer = DecomposedConv(8, k=5).eval()
    x = torch.randn(1, 63, 8, requires_grad=True)
    out = mixer(x, TokenLayout(grid=(7, 9)))
    (grad,) = torch.autograd.grad(out.unflatten(1, (7, 9))[0, 3, 4].sum(), x)
    seen = grad[0].unflatten(0, (7, 9)).abs().sum(-1) > 0
    expected = torch.zeros(7, 9, dtype=torch.bool)
    expected[1:6, 4] = expected[3, 2:7] = True
    assert torch.equal(seen, expected)


def test_tokens_of_a_volume_are_mixed_along_three_axes():
    torch.manual_seed(0)
    mixer, layout = DecomposedConv(8, k=3, dims=3).eval(), TokenLayout(grid=(3, 4, 5))
    x = torch.randn(2, 60, 8)
    cells = mixer.conv(x.transpose(1, 2).reshape(2, 8, 3, 4, 5))
    torch.testing.assert_close(mixer(x, layout), cells.flatten(2).transpose(1, 2))
    with pytest.raises(BadInput, match="give dims=3"):
        DecomposedConv(8)(x, layout)


def test_prefix_tokens_attend_to_all_with_the_old_weights():
    torch.manual_seed(0)
    model = vitkit.build("vit_femto", img_size=16, in_chans=1, num_classes=3, reg_tokens=2).eval()
    old = model.blocks[0].attn
    x, layout = model.embed(torch.rand(2, 1, 16, 16))
    expected = old(x, layout)[:, :3]
    vitkit.swap(model, "mixer", "decomposed-conv", k=3)
    torch.testing.assert_close(model.blocks[0].attn(x, layout)[:, :3], expected)


def test_merged_tokens_are_refused():
    with pytest.raises(ValueError, match="decomposed-conv needs every cell"):
        DecomposedConv(8)(
            torch.randn(1, 4, 8), TokenLayout(grid=(2, 2), valid=torch.tensor([[True, True, True, False]]))
        )
