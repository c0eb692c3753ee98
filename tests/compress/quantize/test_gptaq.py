from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.anatomy import linear_inputs
from vitkit.compress.cost import count_params, size_bytes
from vitkit.compress.quantize.gptaq import gptaq
from vitkit.compress.quantize.gptaq import restore as restore_gptaq
from vitkit.compress.quantize.gptq import gptq
from vitkit.compress.quantize.gptq import restore as restore_gptq
from vitkit.compress.quantize.linear import ActLinear, QuantLinear
from vitkit.compress.quantize.rtn import restore as restore_rtn
from vitkit.compress.quantize.rtn import rtn
from vitkit.errors import BadInput
from vitkit.models.build import build
from vitkit.models.normalized import NormalizedModel

METHODS = {"rtn": (rtn, restore_rtn), "gptq": (gptq, restore_gptq), "gptaq": (gptaq, restore_gptaq)}


def _vit(wrapped: bool = True, **options) -> nn.Module:
    torch.manual_seed(0)
    vit = build("vit_femto", img_size=8, in_chans=1, num_classes=3, depth=2, embed_dim=16, **options)
    # timm starts the head at zero, and logits that are all zero would agree whatever happens
    nn.init.normal_(vit.head.weight)
    return NormalizedModel(vit, [0.4], [0.3]) if wrapped else vit


def _images(n: int = 12) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_the_input_model_is_left_alone_and_the_output_runs(name, training):
    model = _vit().train(training)
    before, rng = _state(model), torch.get_rng_state()
    new, change = METHODS[name][0](model, _images(), w_bits=4, a_bits=8)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    for m in (model, new):
        assert m.training is training and all(x.training is training for x in m.modules())
        assert not any(x._forward_pre_hooks or x._forward_hooks for x in m.modules())
    assert all(p.requires_grad for p in model.parameters())
    layers = [n for n, m in new.named_modules() if isinstance(m, QuantLinear)]
    assert tuple(layers) == change.touched and len(layers) == 8
    assert new(_images()).shape == (12, 3) and torch.isfinite(new(_images())).all()
    assert change.params_before == change.params_after == count_params(new)
    assert change.details["packed_bytes"] == size_bytes(new) < change.details["bytes_before"] == size_bytes(model)
    assert change.details["realised"] == "memory-only" and change.details["skipped"] == {}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "options",
    [
        {"w_bits": 2},
        {"w_bits": 4, "a_bits": 4, "sym": True},
        {"w_bits": 3, "group_size": 8, "head_bits": 8},
        {"w_bits": 16, "a_bits": 6},
        {"w_bits": 4, "group_size": 4, "static_groups": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_restore_rebuilds_the_structure_for_the_weights(name, options, wrapped):
    transform, restore = METHODS[name]
    if name == "rtn":
        options = {k: v for k, v in options.items() if k != "static_groups"}
    model = _vit(wrapped).eval()
    new, _ = transform(model, _images(), **options)
    applied = (new.model if wrapped else new).applied
    assert [step["name"] for step in applied] == [name] and not getattr(model, "applied", [])
    fresh = _vit(wrapped).eval()
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    again = restore(fresh, json.loads(json.dumps(applied[0]["options"])))
    again.load_state_dict(new.state_dict())
    assert torch.equal(again(_images()), new(_images()))
    assert (again.model if wrapped else again).applied == applied
    assert torch.equal(copy.deepcopy(new)(_images()), new(_images()))


@pytest.mark.parametrize("transform", [gptq, gptaq, rtn])
@pytest.mark.parametrize("a_bits", [None, 4])
def test_layer_errors_are_those_of_the_finished_model(transform, a_bits):
    model = _vit().eval()
    images = _images()
    new, change = transform(model, images, w_bits=3, a_bits=a_bits, batch_size=5)
    x_full: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    names = list(change.touched)
    handles = [
        new.get_submodule(n).register_forward_hook(lambda m, _, out, n=n: outputs.__setitem__(n, out)) for n in names
    ]
    with torch.no_grad(), linear_inputs(model, names, lambda n, x: x_full.__setitem__(n, x)):
        model(images)
        new(images)
    for handle in handles:
        handle.remove()
    for row in change.details["layers"]:
        old, layer = model.get_submodule(row["name"]), new.get_submodule(row["name"])
        target = F.linear(x_full[row["name"]], old.weight)
        error = (outputs[row["name"]] - layer.bias - target).square().sum() / target.square().sum()
        assert row["error"] == pytest.approx(float(error.detach()), rel=2e-3)
    assert [r["block"] for r in change.details["layers"]] == [0] * 4 + [1] * 4


def test_statistics_are_gathered_with_the_inputs_rounded():
    """The first layer's weights must come from its rounded input: compare with solving it by hand."""
    from vitkit.compress.quantize.grid import Grid
    from vitkit.compress.quantize.solver import solve

    model = _vit().eval()
    images = _images()
    found: list[Tensor] = []
    with torch.no_grad(), linear_inputs(model, ["model.blocks.0.attn.qkv"], lambda _, x: found.append(x)):
        model(images)
    x_full = found[0].reshape(-1, 16)
    x = Grid(bits=3, granularity="token")(x_full)
    h, d = 2 * x.T @ x / 12, 2 * (x_full - x).T @ x / 12
    weight = model.model.blocks[0].attn.qkv.weight.detach()
    expected = solve(weight, h, d, Grid(bits=4, clip_search=True), damp=0.1, alpha=0.25)
    new, _ = gptaq(model, images, w_bits=4, a_bits=3)
    torch.testing.assert_close(new.model.blocks[0].attn.qkv.weight, expected.weight, rtol=1e-4, atol=1e-5)
    other, _ = gptaq(model, images, w_bits=4)
    assert not torch.allclose(other.model.blocks[0].attn.qkv.weight, expected.weight, atol=1e-4)


def test_batches_and_lists_of_images_make_no_difference():
    model = _vit().eval()
    images = _images()
    parts = images.split(5)
    given = [(images, 4), (list(parts), 32), ([(x, torch.zeros(len(x))) for x in parts], 32)]
    given.append(([{"images": x, "labels": torch.zeros(len(x))} for x in parts], 32))
    first, *others = (gptaq(model, x, w_bits=3, batch_size=b)[0].model.blocks[0].attn.qkv.codes for x, b in given)
    for codes in others:
        # float32 sums differ in their last bits; a code may tip at a tie
        assert float((codes != first).float().mean()) < 0.01


@pytest.mark.parametrize("mode", ["gptaq", "shift"])
def test_sixteen_bits_and_equal_streams_return_the_weights_bit_for_bit(mode):
    model = _vit().eval()
    new, change = gptaq(model, _images(), w_bits=16, mode=mode)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in new.state_dict().items())
    assert torch.equal(new(_images()), model(_images()))
    assert change.details["realised"] == "no" and change.lost == ""


def test_sixteen_bit_weights_can_make_up_for_rounded_inputs():
    model = _vit(wrapped=False).eval()
    images = _images(64)
    plain, _ = rtn(model, images, w_bits=16, a_bits=3)
    shifted, change = gptaq(model, images, w_bits=16, a_bits=3, mode="shift", damp=0.01)
    assert all(isinstance(m, ActLinear) for n, m in shifted.named_modules() if n in change.touched)
    assert torch.equal(plain.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    errors = [c.details["mean_error"] for c in (rtn(model, images, w_bits=16, a_bits=3)[1], change)]
    assert errors[1] < errors[0]


def test_the_head_is_rounded_only_when_asked():
    model = _vit().eval()
    assert type(gptaq(model, _images())[0].model.head) is nn.Linear
    new, change = gptaq(model, _images(), head_bits=8)
    assert isinstance(new.model.head, QuantLinear) and new.model.head.bits == 8 and change.touched[-1] == "model.head"
    assert new.model.head.a_bits is None


@pytest.mark.parametrize("transform", [gptq, gptaq])
@pytest.mark.parametrize("options", [{}, {"residual": "released"}, {"act_order": False}, {"block_size": 4}])
def test_options_reach_the_solver(transform, options):
    model = _vit().eval()
    base, _ = transform(model, _images(), w_bits=2, a_bits=4)
    other, _ = transform(model, _images(), w_bits=2, a_bits=4, **options)
    same = torch.equal(base.model.blocks[1].mlp.fc2.codes, other.model.blocks[1].mlp.fc2.codes)
    # at width 16 there is one block of columns, so only the order changes anything
    assert same is ("act_order" not in options) or options == {"block_size": 4}


def test_alpha_zero_is_gptq():
    model = _vit().eval()
    a, _ = gptaq(model, _images(), w_bits=3, a_bits=4, alpha=0.0)
    b, _ = gptq(model, _images(), w_bits=3, a_bits=4)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    c, _ = gptaq(model, _images(), w_bits=3, a_bits=4)
    assert not torch.equal(a.model.blocks[1].mlp.fc2.codes, c.model.blocks[1].mlp.fc2.codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = _vit().eval().to(dtype)
    new, _ = gptaq(model, _images().to(dtype), w_bits=8, a_bits=8)
    out = new(_images().to(dtype))
    assert out.dtype == dtype and _gap(out, model(_images().to(dtype))) < 0.05


def test_gradients_reach_the_pixels():
    new, _ = gptaq(_vit().eval(), _images(), w_bits=4, a_bits=4)
    x = _images().requires_grad_()
    new(x).square().sum().backward()
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize("prefix", [{"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}])
def test_prefix_tokens_colour_and_oblong_grids(prefix):
    torch.manual_seed(0)
    model = build(
        "vit_femto", img_size=(10, 14), in_chans=3, num_classes=3, depth=1, embed_dim=16, patch_size=2, **prefix
    )
    nn.init.normal_(model.head.weight)
    images = torch.rand(4, 3, 10, 14)
    new, _ = gptaq(model.eval(), images, w_bits=8, a_bits=8)
    assert _gap(new(images), model(images)) < 0.05


def test_merging_models_can_be_quantized():
    from vitkit.compress.merge.tome import tome

    model, _ = tome(_vit(wrapped=False).eval(), r=3)
    new, change = gptaq(model, _images(), w_bits=8, a_bits=8)
    assert max(r["error"] for r in change.details["layers"]) < 0.05
    assert new(_images()).shape == (12, 3)
    assert [s["name"] for s in new.applied] == ["tome", "gptaq"]


@pytest.mark.parametrize("name", ["swin", "convnext", "mixer"])
@pytest.mark.parametrize("transform", [rtn, gptaq])
def test_networks_that_are_no_plain_vit(name, transform):
    torch.manual_seed(0)
    images = torch.rand(4, 1, 32, 32) if name == "convnext" else torch.rand(4, 1, 16, 16)
    if name == "swin":
        from timm.models.swin_transformer import SwinTransformer

        model = SwinTransformer(
            img_size=16, patch_size=2, window_size=4, in_chans=1, num_classes=3, embed_dim=8, depths=(1, 1),
            num_heads=(2, 2),
        )  # fmt: skip
    elif name == "convnext":
        from timm.models.convnext import ConvNeXt

        model = ConvNeXt(in_chans=1, num_classes=3, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), patch_size=2)
    else:
        from timm.models.mlp_mixer import MlpMixer

        model = MlpMixer(img_size=16, patch_size=4, in_chans=1, num_classes=3, embed_dim=8, num_blocks=1)
    nn.init.normal_(model.get_classifier().weight)
    model = NormalizedModel(model, [0.5], [0.5]).eval()
    assert float(model(images).detach().std()) > 0.1
    new, change = transform(model, images, w_bits=8, a_bits=8)
    assert _gap(new(images), model(images)) < 0.05
    assert len(change.touched) > 3 and not any("head" in n for n in change.touched)
    again = METHODS[transform.__name__][1](copy.deepcopy(model), new.applied[0]["options"])
    again.load_state_dict(new.state_dict())
    assert torch.equal(again(images), new(images))


def test_a_convolutional_network_says_that_nothing_can_be_quantized():
    from timm.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=3, in_chans=1, channels=(8, 8, 8, 8))
    for transform in (rtn, gptq, gptaq):
        with pytest.raises(BadInput, match="no plain linear layer.*besides its classifier, and convolutions"):
            transform(model, torch.rand(2, 1, 32, 32))


def test_layers_that_are_never_called_are_named_not_dropped():
    model = _vit().eval()
    model.model.blocks[0].spare = nn.Linear(16, 16)
    new, change = gptaq(model, _images())
    assert list(change.details["skipped"]) == ["model.blocks.0.spare"]
    assert type(new.model.blocks[0].spare) is nn.Linear
    again = restore_gptaq(copy.deepcopy(model), new.model.applied[0]["options"])
    again.load_state_dict(new.state_dict())


def test_rounding_to_nearest_needs_no_images_and_they_change_nothing():
    model = _vit().eval()
    a, without = rtn(model, w_bits=3)
    b, measured = rtn(model, _images(), w_bits=3)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert without.details["mean_error"] is None and measured.details["mean_error"] > 0


def test_progress_counts_layers():
    seen: list[tuple[str, int, int]] = []
    gptaq(_vit().eval(), _images(), progress=lambda *a: seen.append(a))
    assert seen == [("gptaq", i, 8) for i in range(1, 9)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 9}, "w_bits=9"),
        ({"a_bits": 1}, "a_bits=1"),
        ({"group_size": 12}, r"does not divide the widths \[16, 32\]"),
        ({"mode": "both"}, "mode='both'"),
        ({"mode": "shift", "alpha": 1.0}, "alpha=1.0"),
        ({"group_size": 0}, "group_size=0"),
    ],
)
def test_misuse_says_what_is_allowed(options, message):
    with pytest.raises(BadInput, match=message):
        gptaq(_vit(), _images(), **options)
    with pytest.raises(BadInput, match="no plain linear layer"):
        rtn(nn.Conv2d(1, 1, 1))
    with pytest.raises(BadInput, match="quantized already"):
        gptaq(gptaq(_vit(), _images())[0], _images())
    with pytest.raises(BadInput, match=r"blocks\.0\.attn\.qkv.*instead of a Linear"):
        new, _ = rtn(_vit(wrapped=False))
        restore_rtn(copy.deepcopy(new), new.applied[0]["options"])
