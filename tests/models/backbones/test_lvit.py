"""LViT: points in every block, timm's contract, precision, curvature and the flat limit."""

from __future__ import annotations

import pytest
import timm
import torch

import vitkit
from vitkit.errors import BadInput
from vitkit.models.backbones.lvit import LViT
from vitkit.models.lorentz import centroid, inner
from vitkit.testing import check_backbone
from vitkit.train.optimizers.choose import param_groups


def femto(**options):
    torch.manual_seed(0)
    defaults = {"img_size": 28, "in_chans": 1, "num_classes": 5, "depth": 2}
    return timm.create_model("lvit_femto", **{**defaults, **options}).eval()


def on_the_sheet(x, c):
    return bool(((inner(x, x) + c).abs() <= 1e-4 * (c + x[..., 1:].square().sum(-1))).all())


VARIANTS = [
    {},
    {"attention": "linear"},
    {"prenorm": "branch"},
    {"curvature": 30.0},
    {"learn_curvature": True, "learn_scale": True, "curvature": 0.2},
]


@pytest.mark.parametrize(("chans", "size"), [(1, 28), (3, 32), (5, 8)])
def test_timms_contract(chans, size):
    assert "reset_classifier" in check_backbone("lvit_femto", image_size=size, in_chans=chans, img_size=size).passed


@pytest.mark.parametrize("options", VARIANTS)
def test_every_block_hands_on_points_and_every_parameter_learns(options):
    model = femto(**options).train()
    images = 3 * torch.randn(4, 1, 28, 28)
    state = model.begin(images)
    c = float(torch.as_tensor(state.c).detach())
    assert c == pytest.approx(options.get("curvature", 1.0)) and on_the_sheet(state.x, c)
    for block in model.stages:
        state = block(state)
        assert on_the_sheet(state.x, c)
    assert on_the_sheet(model.pool(state.x), c)
    model(images).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and (p.grad != 0).any() for p in model.parameters())


@pytest.mark.parametrize("options", VARIANTS)
def test_bfloat16_weights_and_autocast_train(options):
    images = torch.randn(4, 1, 28, 28)
    plain = femto(**options)
    with torch.no_grad():
        wanted = plain(images)
    half = femto(**options).bfloat16().train()
    out = half(images.bfloat16())
    assert out.dtype == torch.bfloat16
    assert on_the_sheet(half.forward_features(images.bfloat16()), float(torch.as_tensor(half.curvature()).detach()))
    out.float().square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in half.parameters())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cast = plain(images)
    assert (cast - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_large_images_values_do_not_break_it():
    model = femto().train()
    out = model(1e3 * torch.randn(2, 1, 28, 28))
    out.sum().backward()
    assert torch.isfinite(out).all() and all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_without_positions_patches_may_be_permuted():
    model = femto()
    with torch.no_grad():
        model.positions.pos_embed.copy_(model.positions.pos_embed[:, :1].expand_as(model.positions.pos_embed))
        images = torch.randn(2, 1, 28, 28)
        # rows of patches, the last one first
        flipped = images.unflatten(2, (7, 4)).flip(2).flatten(2, 3)
        assert torch.allclose(model(images), model(flipped), atol=1e-4)
        assert not torch.allclose(femto()(images), femto()(flipped), atol=1e-4)


def test_the_learned_curvature_gets_a_gradient_from_the_loss():
    model = femto(learn_curvature=True).double()
    images = torch.randn(3, 1, 28, 28, dtype=torch.float64)

    def loss(raw):
        with torch.no_grad():
            model.curvature.raw.copy_(raw)
        return model(images).square().sum()

    raw = model.curvature.raw.detach().clone()
    loss(raw).backward()
    step = 1e-5
    slope = (loss(raw + step) - loss(raw - step)).detach() / (2 * step)
    assert float(model.curvature.raw.grad) == pytest.approx(float(slope), rel=1e-3)


def test_the_norm_on_the_stream_reaches_the_residual():
    stream, branch = femto(), femto(prenorm="branch")
    branch.load_state_dict(stream.state_dict())
    state = stream.begin(torch.randn(2, 1, 28, 28))
    block, c = stream.stages[0], state.c
    normed = block.norm1(state.x, c)
    x = block.residual1(normed, block.attn(normed, c), c)
    wanted = block.residual2(x, block.mlp(block.norm2(x, c), c), c)
    assert torch.allclose(block(state).x, wanted)
    assert not torch.allclose(branch.stages[0](state).x, wanted, atol=1e-2)
    with pytest.raises(BadInput, match="'branch'"):
        femto(prenorm="post")


def test_pooling_and_the_parts_of_the_head():
    model, images = femto(), torch.randn(2, 1, 28, 28)
    features = model.forward_features(images)
    assert features.shape == (2, 49, 68)
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, centroid(features, 1.0)) and pooled.shape[-1] == model.num_features == 68
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    model.reset_classifier(3, "")
    assert model(images).shape == (2, 49, 3)
    with pytest.raises(ValueError, match="centroid"):
        femto(global_pool="avg")


def test_features_maps_and_other_image_sizes():
    features = timm.create_model("lvit_femto", features_only=True, out_indices=(0, 2))
    assert [tuple(m.shape) for m in features(torch.randn(1, 3, 32, 32))] == [(1, 68, 8, 8)] * 2
    model = femto(img_size=(28, 36))
    assert model(torch.randn(1, 1, 28, 36)).shape == (1, 5)
    last, maps = model.forward_intermediates(torch.randn(1, 1, 28, 36), norm=True)
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), last)
    with pytest.raises(BadInput, match="28×36"):
        model(torch.randn(1, 1, 28, 28))
    with pytest.raises(BadInput, match="multiple"):
        LViT(img_size=30, patch_size=4)
    with pytest.raises(BadInput, match="curvature"):
        femto(curvature=-1.0)


@pytest.mark.parametrize(("name", "millions"), [("lvit_tiny", 5.9), ("lvit_small", 22.6), ("lvit_base", 88.9)])
def test_the_larger_sizes(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    attn = model.stages[0].attn
    assert attn.head_dim == 64 and len(model.stages) == 12
    scale = 27.5 if name == "lvit_base" else (model.embed_dim - 1) ** 0.5
    assert model.stages[0].residual1.scale == pytest.approx(scale)


def test_positions_and_curvature_are_not_decayed():
    model = femto(learn_curvature=True)
    plain = {id(p) for p in param_groups(model, 0.05)[1]["params"]}
    assert id(model.positions.pos_embed) in plain and id(model.curvature.raw) in plain
    assert id(model.stages[0].attn.qkv.weight) not in plain
    assert "positions.pos_embed" in model.no_weight_decay()


@pytest.mark.parametrize("attention", ["full", "linear"])
def test_it_compiles_in_one_piece(attention):
    model = femto(depth=1, attention=attention)
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(torch.randn(2, 1, 28, 28)).graph_break_count == 0


def test_it_learns_and_build_knows_the_name():
    model = vitkit.build("lvit_femto", img_size=8, in_chans=1, num_classes=4, depth=1).train()
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2
