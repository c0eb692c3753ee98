"""The shared-convolution MLP: its hidden widths, its start, its reach inside a token."""

from __future__ import annotations

import torch
from torch import nn

import vitkit
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mlps.conv_share_mlp import ConvShareMLP
from vitkit.models.shared_conv import SharedConv
from vitkit.models.swap import spec_of
from vitkit.testing.worlds import tiny_vit


def part(**options) -> ConvShareMLP:
    torch.manual_seed(0)
    model = tiny_vit(8, 2, depth=1)
    return ConvShareMLP.from_standard(model.blocks[0].mlp, spec_of(model, 0), **options)


def test_hidden_numbers_are_laid_out_as_the_largest_squares():
    for ratio, maps, side in ((2.0, 2, 8), (4.0, 1, 16), (3.0, 3, 8), (0.5, 2, 4)):
        second = part(ratio=ratio).fc2
        assert (second.maps, second.side, second.kernel) == (maps, side, side)


def test_small_kernels_keep_at_least_the_hidden_width():
    mlp = part(kernel=5, ratio=2.0)
    assert (mlp.fc1.kernels, mlp.fc1.out_side) == (8, 4) and mlp.fc2.kernel == 4
    same = part(kernel=3, padding="same", ratio=4.0)
    assert (same.fc1.kernels, same.fc2.maps, same.fc2.kernels) == (4, 4, 1)


def test_two_same_layers_see_two_half_kernels():
    mlp = part(kernel=3, padding="same", ratio=4.0).double()
    x = torch.randn(1, 17, 64, dtype=torch.float64, requires_grad=True)
    mlp(x, TokenLayout(grid=(4, 4), prefix=(("class", 1),)))[0, 3, 3 * 8 + 3].backward()
    seen = x.grad[0].abs() > 0
    assert not seen[[i for i in range(17) if i != 3]].any()
    inside = seen[3].view(8, 8)
    assert inside[1:6, 1:6].all() and int(inside.sum()) == 25


def test_a_changed_ratio_starts_fresh_and_keeps_the_rest():
    model = tiny_vit(8, 2, depth=1)
    old = model.blocks[0].mlp
    new = ConvShareMLP.from_standard(old, spec_of(model, 0), ratio=4.0)
    assert new.fc1.out_features == 256 and new.act is old.act
    model.blocks[0].mlp = new
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_a_second_swap_starts_from_the_first():
    model, x = tiny_vit(8, 2, depth=1).eval(), torch.randn(2, 1, 8, 8)
    nn.init.normal_(model.head.weight)
    plain = model(x)
    for _ in range(2):
        vitkit.swap(model, "mlp", ConvShareMLP)
    assert isinstance(model.blocks[0].mlp.fc1, SharedConv) and torch.allclose(model(x), plain, atol=1e-5)


def test_a_gated_mlp_is_replaced_by_a_plain_one():
    model = vitkit.build("eva02_tiny_patch14_224", img_size=28, num_classes=3, depth=1)
    hidden = spec_of(model, 0).mlp_ratio * 192
    vitkit.swap(model, "mlp", ConvShareMLP, maps=3)
    assert model.blocks[0].mlp.fc2.in_features == round(hidden)
    assert model(torch.randn(1, 3, 28, 28)).shape == (1, 3)
