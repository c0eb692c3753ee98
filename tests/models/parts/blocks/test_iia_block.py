"""The iiA block in a plain ViT: prefix tokens, heads, and the token sets it refuses."""

from __future__ import annotations

import pytest
import torch

import vitkit
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.blocks.iia import IIABlock
from vitkit.models.vit import ViT


def host(embed_dim=32, **options) -> ViT:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "depth": 2, "num_heads": 4, "num_classes": 3}
    return ViT(**shape, embed_dim=embed_dim, **options).eval()


def test_prefix_tokens_read_the_patches_and_patches_do_not_read_them():
    model = host(reg_tokens=2)
    vitkit.swap(model, "block", "iia")
    x, layout = model.embed(torch.rand(2, 3, 16, 16))
    x = x.detach().requires_grad_()
    out, after = model.blocks[0](x, layout)
    assert after is layout and out.shape == x.shape
    (grad,) = torch.autograd.grad(out[:, 3:].square().sum(), x, retain_graph=True)
    assert not grad[:, :3].any() and bool((grad[:, 3:] != 0).any(-1).all())
    (grad,) = torch.autograd.grad(out[:, 0].square().sum(), x)
    assert bool((grad != 0).any(-1).all())


def test_patches_are_the_block_on_their_map():
    model = host(global_pool="avg", class_token=False)
    vitkit.swap(model, "block", "iia", where=0, registers=2)
    x, layout = model.embed(torch.rand(2, 3, 16, 16))
    block = model.blocks[0]
    assert block.prefix is None and len(block.iia.branches[2].body[0].register_kv[0, 0]) == 2
    expected = block.iia(x.transpose(1, 2).unflatten(2, (4, 4))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(block(x, layout)[0], expected)


def test_a_warm_prefix_starts_with_the_old_attention():
    model = host()
    old = model.blocks[1]
    vitkit.swap(model, "block", "iia")
    new = model.blocks[1].prefix
    assert torch.equal(new.attn.q.weight, old.attn.qkv.weight[:32]) and new.norm is not old.norm1
    cold = host()
    vitkit.swap(cold, "block", "iia", warm=False)
    assert not torch.equal(cold.blocks[1].prefix.attn.q.weight, old.attn.qkv.weight[:32])


@pytest.mark.parametrize(("dim", "heads"), [(32, 1), (64, 1), (128, 2), (192, 3), (384, 6)])
def test_heads_are_at_least_eight_wide(dim, heads):
    assert IIABlock(dim, (2, 2)).iia.branches[2].body[0].num_heads == heads


def test_other_token_sets_are_refused_by_name():
    block, x = IIABlock(16, (2, 2)), torch.randn(1, 8, 16)
    with pytest.raises(BadInput, match="iia works on grids of 2 axes, and 2×2×2 has 3"):
        block(x, TokenLayout(grid=(2, 2, 2)))
    with pytest.raises(ValueError, match="merged"):
        block(x, TokenLayout(grid=(2, 4), valid=torch.ones(1, 8, dtype=torch.bool)))
    with pytest.raises(BadInput, match="without prefix"):
        block(x, TokenLayout(grid=(7, 1), prefix=(("class", 1),)))
    with pytest.raises(BadInput, match="multiple of 8"):
        IIABlock(20, (2, 2))
