from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import vitkit
from vitkit.models.parts.tokenizers.conv_stem import ConvStem


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def stem(patch_size=4, img_size=16, dim=32, in_chans=3, **options):
    torch.manual_seed(0)
    return ConvStem(dim, (patch_size, patch_size), (img_size, img_size), in_chans, **options).eval()


def host(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "in_chans": 3, "num_classes": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = vitkit.build("vit_femto", patch_size=4, **(sizes | options)).eval()
    # timm's head starts at zero, whose answers are all alike
    nn.init.normal_(model.head.weight)
    return model


def convolutions(part):
    return [
        (m.kernel_size, m.stride, m.out_channels, m.bias is not None)
        for m in part.modules()
        if isinstance(m, nn.Conv2d)
    ]


def test_layers_of_the_papers_smallest_model():
    # ViT-C of one GFLOP: width 192, patch 16
    part = stem(16, 224, 192)
    three, one = ((3, 3), (2, 2)), ((1, 1), (1, 1))
    assert convolutions(part) == [(*three, width, False) for width in (24, 48, 96, 192)] + [(*one, 192, True)]
    weights = 9 * (3 * 24 + 24 * 48 + 48 * 96 + 96 * 192) + 2 * (24 + 48 + 96 + 192) + 192 * 192 + 192
    assert sum(p.numel() for p in part.parameters()) == weights
    assert part.grid_size == (14, 14) and part.num_patches == 196


def test_equals_its_equation():
    part = stem().train()
    x = images(4, 3, 16, 16)
    y = x
    for conv in (part.stem[0], part.stem[3]):
        y = F.conv2d(y, conv.weight, stride=2, padding=1)
        y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        y = y.clamp(min=0)
    y = torch.einsum("dc,bchw->bhwd", part.proj.weight[..., 0, 0], y) + part.proj.bias
    tokens, layout = part(x)
    torch.testing.assert_close(tokens, y.flatten(1, 2), atol=1e-5, rtol=1e-5)
    assert layout.grid == (4, 4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4), columns=st.integers(1, 4), p_h=st.integers(1, 16), p_w=st.sampled_from([1, 2, 3, 4, 7, 16])
)
def test_the_grid_is_that_of_a_patch_embedding(rows, columns, p_h, p_w):
    size = (rows * p_h, columns * p_w)
    part = ConvStem(8, (p_h, p_w), size, 1).eval()
    tokens, layout = part(images(1, 1, *size))
    assert layout.grid == part.grid_size == (rows, columns)
    assert tokens.shape == (1, rows * columns, 8) and part.num_patches == rows * columns


@pytest.mark.parametrize("patch_size", [2, 4, 6, 7, 8, 14])
def test_every_pixel_is_seen_and_a_token_looks_around_its_own_patch(patch_size):
    part = stem(patch_size, 5 * patch_size)
    with torch.no_grad():
        for m in part.modules():
            if isinstance(m, nn.Conv2d):
                # positive weights and positive inputs: no path is cut off by ReLU or cancelled
                m.weight.abs_()
    x = (1 + images(1, 3, 5 * patch_size, 5 * patch_size)).requires_grad_()
    tokens, _ = part(x)
    (reach,) = torch.autograd.grad(tokens[0, 12].sum(), x, retain_graph=True)
    (all_of_it,) = torch.autograd.grad(tokens.sum(), x)
    seen = reach[0].abs().sum(0) > 0
    own = slice(2 * patch_size, 3 * patch_size)
    assert (all_of_it[0] != 0).all()
    # its own patch wholly, pixels of its neighbours too, and nothing further than one patch away
    assert seen[own, own].all() and seen.sum() > patch_size**2
    assert not seen[:patch_size].any() and not seen[4 * patch_size :].any()
    assert not seen[:, :patch_size].any() and not seen[:, 4 * patch_size :].any()


def test_moves_with_the_image():
    part = stem(4, 32)
    x = torch.zeros(1, 3, 32, 32)
    x[..., 12:18, 10:20] = images(3, 6, 10)
    tokens = part(x)[0].unflatten(1, (8, 8))
    moved = part(x.roll((4, -4), (-2, -1)))[0].unflatten(1, (8, 8))
    # the outermost tokens see the zeros of the padding instead of more image
    torch.testing.assert_close(moved[:, 2:7, 1:6], tokens[:, 1:6, 2:7])


def test_one_by_one_patches_and_a_plain_ladder_of_channels():
    assert convolutions(stem(1, 5)) == [((3, 3), (1, 1), 32, False), ((1, 1), (1, 1), 32, True)]
    assert [c[2] for c in convolutions(stem(8, 16, 30))] == [8, 15, 30, 30]


def test_deeper_stem_with_its_own_strides():
    part = stem(16, 32, channels=(64, 128, 128, 256, 256, 512), strides=(2, 2, 1, 2, 1, 2))
    assert [c[1][0] for c in convolutions(part)] == [2, 2, 1, 2, 1, 2, 1]
    assert part(images(1, 3, 32, 32))[0].shape == (1, 4, 32)


def test_one_convolution_may_be_given_as_numbers():
    assert convolutions(stem(2, 8, channels=48, strides=2)) == convolutions(stem(2, 8, channels=(48,)))


def test_tokens_start_with_a_variance_near_one():
    part = stem(16, 64, 192).train()
    assert 0.5 < part(images(8, 3, 64, 64))[0].var().item() < 2


def test_in_the_host_and_out_again():
    model = host()
    old = model.patch_embed
    x = images(2, 3, 16, 16)
    before = model(x)
    record = vitkit.swap(model, "tokenizer", "conv-stem")
    assert isinstance(model.patch_embed, ConvStem) and not torch.allclose(model(x), before)
    record.undo()
    assert model.patch_embed is old
    torch.testing.assert_close(model(x), before)


def test_other_image_sizes_and_padding():
    model = host(tokenizer="conv-stem", dynamic_img_size=True)
    assert model(images(1, 3, 24, 8)).shape == (1, 4)
    padded = host(tokenizer="conv-stem", dynamic_img_size=True, dynamic_img_pad=True)
    tokens, layout = padded.tokenize(images(1, 3, 18, 15))
    assert layout.grid == (5, 4) and tokens.shape[1] == 20


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match=r"18×16 pixels.*4×4 patches.*16×16"):
        stem()(images(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"strides=\(2, 3\).*patch size 4×4"):
        stem(strides=(2, 3))
    with pytest.raises(ValueError, match=r"channels=\(8,\).*2 convolutions"):
        stem(channels=(8,))
    with pytest.raises(ValueError, match="NeuRN.*first"):
        host(tokenizer=["neurn", "conv-stem"])
