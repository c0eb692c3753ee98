"""DCFormer's block in a plain ViT: what a warm swap keeps, γ, and prefix tokens."""

from __future__ import annotations

import pytest
import torch

import vitkit
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.blocks.dcformer_block import DCFormerBlock


def host(**options):
    torch.manual_seed(0)
    return vitkit.build("vit_femto", img_size=16, in_chans=1, num_classes=3, **options).eval()


def test_a_warm_swap_keeps_the_mlp_if_it_is_as_wide():
    model = host()
    old = model.blocks[0].mlp
    vitkit.swap(model, "block", "dcformer-block")
    body = model.blocks[0].body
    assert torch.equal(body.fc1.weight, old.fc1.weight) and torch.equal(body.fc2.bias, old.fc2.bias)
    other = host()
    vitkit.swap(other, "block", "dcformer-block", mlp_ratio=1.0)
    assert other.blocks[0].body.fc1.out_features == other.embed_dim
    cold = host()
    vitkit.swap(cold, "block", "dcformer-block", warm=False)
    assert not torch.equal(cold.blocks[0].body.fc1.weight, old.fc1.weight)


def test_with_gamma_zero_patches_stay_and_the_prefix_reads_them():
    model = host(reg_tokens=1)
    vitkit.swap(model, "block", "dcformer-block", layer_scale=0.0)
    x, layout = model.embed(torch.rand(2, 1, 16, 16))
    out, _ = model.blocks[0](x, layout)
    assert torch.equal(out[:, 2:], x[:, 2:])
    assert not torch.allclose(out[:, :2], x[:, :2], atol=1e-3)


def test_volumes_and_wrong_grids():
    torch.manual_seed(0)
    block, layout = DCFormerBlock(8, k=3, dims=3, layer_scale=1.0).eval(), TokenLayout(grid=(3, 2, 4))
    x = torch.randn(2, 24, 8)
    expected = block.body(x.transpose(1, 2).reshape(2, 8, 3, 2, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(block(x, layout)[0], expected)
    with pytest.raises(BadInput, match="give dims=2"):
        block(x, TokenLayout(grid=(4, 6)))
