"""ConvShare projections in a host: exact for full valid kernels, blind between tokens by themselves, and refusals."""

from __future__ import annotations

import pytest
import torch

import vitkit
from vitkit.anatomy import Trace, check
from vitkit.errors import BadInput
from vitkit.models.parts.mixers.conv_share import ConvShareAttention
from vitkit.models.parts.mlps.conv_share_mlp import ConvShareMLP
from vitkit.models.vit import Attention, ViT
from vitkit.testing import check_part
from vitkit.testing.worlds import tiny_vit

FORMS = ({"kernel": "half"}, {"padding": "same", "kernel": 3}, {"share": False}, {"share": False, "kernel": 2})


def host(**options) -> ViT:
    model = tiny_vit(20, 4, 3, 5, depth=2, **options)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


def images(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 20, 20, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"qk_norm": True}, {"reg_tokens": 4}, {"mlp_ratio": 3.0}])
def test_with_the_hosts_weights_the_whole_model_is_the_host(options):
    model, x = host(**options), images()
    plain = model(x)
    vitkit.swap(model, "mixer", ConvShareAttention)
    vitkit.swap(model, "mlp", ConvShareMLP)
    assert torch.allclose(model(x), plain, atol=1e-5)
    check(model)


def test_a_real_width_needs_several_maps():
    model = ViT(
        img_size=32, patch_size=16, embed_dim=192, depth=1, num_heads=3, num_classes=5, weight_init="jax"
    ).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    x = torch.randn(2, 3, 32, 32)
    plain = model(x)
    for slot, part in (("mixer", ConvShareAttention), ("mlp", ConvShareMLP)):
        with pytest.raises(BadInput, match="no square.*maps=3"):
            vitkit.swap(model, slot, part, maps=1)
        vitkit.swap(model, slot, part)
    assert torch.allclose(model(x), plain, atol=1e-5)


@pytest.mark.parametrize("part", [ConvShareAttention, ConvShareMLP])
@pytest.mark.parametrize("options", FORMS)
def test_every_form_keeps_the_contract(part, options):
    report = check_part(part, maps=2, dynamo=options == FORMS[0], **options)
    assert not report.refused and "gradients" in report.passed


def test_without_warm_the_weights_are_new_and_the_place_is_kept():
    model = host()
    vitkit.swap(model, "normalizer", "sinkhorn")
    vitkit.swap(model, "mixer", ConvShareAttention, warm=False)
    old = host()
    weight = model.blocks[0].attn.qkv.q.weight.flatten(1)
    assert not torch.allclose(weight, old.blocks[0].attn.qkv.weight[:64])
    assert model.blocks[0].attn.normalizer is not None and model.blocks[1].attn.depth_index == 1


def test_fresh_full_kernels_start_as_wide_as_a_fused_layer():
    attn = host(mixer=("conv-share", {"warm": False})).blocks[0].attn
    fused = host().blocks[0].attn.qkv.weight
    for layer in attn.qkv.children():
        assert float(layer.weight.detach().std()) == pytest.approx(float(fused.detach().std()), rel=0.05)


def test_attention_of_the_form_can_be_looked_at():
    model = host(mixer=("conv-share", {"padding": "same", "kernel": 3}))
    with Trace(model, "blocks.*.attn.weights") as trace:
        model(images())
    weights = trace["blocks.1.attn.weights"]
    assert weights.shape == (2, 4, 26, 26) and torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"padding": "same", "kernel": 3}])
def test_other_mixers_can_start_from_linear_forms(options):
    model, x = host(), images()
    vitkit.swap(model, "mixer", ConvShareAttention, **options)
    plain = model(x)
    vitkit.swap(model, "mixer", "partitioned-attention", blocks=1)
    assert torch.allclose(model(x), plain, atol=1e-5)
    dense = host(mixer=("conv-share", options)).blocks[0].attn.standard()
    assert type(dense) is Attention and dense.qkv.weight.shape == (192, 64)


@pytest.mark.parametrize("options", [{"kernel": "half"}, {"share": False}])
def test_others_are_refused_as_a_start(options):
    model = host(mixer=("conv-share", options))
    with pytest.raises(BadInput, match="no linear layer equals"):
        vitkit.swap(model, "mixer", "partitioned-attention")


def test_heads_that_are_not_as_wide_as_the_tokens():
    model = host()
    # as after pruning a head of 16
    attn = Attention(64, 3, attn_head_dim=16, qkv_bias=True)
    model.blocks[0].attn = attn
    x = images()
    plain = model(x)
    vitkit.swap(model, "mixer", ConvShareAttention, where=0)
    assert torch.allclose(model(x), plain, atol=1e-5)
    model.blocks[0].attn = attn
    with pytest.raises(BadInput, match="48 wide together"):
        vitkit.swap(model, "mixer", ConvShareAttention, where=0, kernel=3)


def test_parameters_of_shared_kernels_do_not_depend_on_the_image():
    def count(size, **options):
        model = tiny_vit(size, 4, 3, 5, depth=1, mixer=("conv-share", options), mlp=("conv-share-mlp", options))
        return sum(p.numel() for p in model.blocks.parameters())

    assert count(16) == count(32) == sum(p.numel() for p in tiny_vit(16, 4, 3, 5, depth=1).blocks.parameters())
    assert count(32, share=False) > 2 * count(16, share=False)


def test_own_kernels_refuse_other_tokens():
    model = host(mixer=("conv-share", {"share": False}), dynamic_img_size=True)
    with pytest.raises(ValueError, match="26 tokens one by one, but 37 came"):
        model(torch.randn(1, 3, 24, 24))
    x, layout = model.embed(images())
    with pytest.raises(ValueError, match="conv-share with share=False needs every cell"):
        model.run(x[:, :20], layout.take(torch.arange(19).expand(2, -1)))


def test_rotary_hosts_keep_their_function():
    model = vitkit.build("eva02_tiny_patch14_224", img_size=56, num_classes=5, depth=1).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    x = torch.randn(1, 3, 56, 56)
    plain = model(x)
    vitkit.swap(model, "mixer", ConvShareAttention, maps=3)
    assert torch.allclose(model(x), plain, atol=1e-4)
