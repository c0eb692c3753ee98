from __future__ import annotations

import pytest
import torch
from torch import nn

from vitkit.errors import BadInput
from vitkit.testing.worlds import tiny_vit
from vitkit.train import precision


def test_auto_is_bf16_exactly_where_it_is_native(monkeypatch):
    monkeypatch.setattr(precision, "native_bf16", lambda device: True)
    assert precision.resolve("auto", "cpu") == "bf16"
    monkeypatch.setattr(precision, "native_bf16", lambda device: False)
    assert precision.resolve("auto", "cpu") == "fp32"
    with pytest.raises(BadInput, match="fp16"):
        precision.resolve("fp16", "cpu")


def test_auto_leaves_narrow_networks_in_fp32_on_a_cpu(monkeypatch):
    monkeypatch.setattr(precision, "native_bf16", lambda device: True)
    narrow, wide = nn.Linear(64, 64), nn.Linear(1024, 8)
    assert precision.resolve("auto", "cpu", narrow) == "fp32"
    assert precision.resolve("auto", "cuda", narrow) == "bf16"
    assert precision.resolve("auto", "cpu", wide) == "bf16"
    assert precision.resolve("bf16", "cpu", narrow) == "bf16"
    vit = tiny_vit(8, 2, 1, 10, depth=2)
    assert 1.2 * vit.embed_dim < precision.width(vit) < 2.1 * vit.embed_dim


@pytest.mark.parametrize(("flags", "native"), [({"avx512_bf16": True}, True), ({"avx2": True}, False), ({}, False)])
def test_native_bf16_reads_the_processor(monkeypatch, flags, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert precision.native_bf16("cpu") is native


def test_autocast_changes_products_not_weights():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with precision.autocast("bf16", "cpu"):
        assert layer(x).dtype == torch.bfloat16
    with precision.autocast("fp32", "cpu"):
        assert layer(x).dtype == torch.float32
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize(("fused_time", "path"), [(3.0, "explicit"), (1.05, "fused"), (0.5, "fused")])
def test_the_faster_path_is_set_and_close_races_keep_the_fused_one(monkeypatch, fused_time, path):
    model = tiny_vit(8, 2, 1, 10, depth=2)
    monkeypatch.setattr(precision, "_time_step", lambda m, x, p: fused_time if m.blocks[0].attn.fused_attn else 1.0)
    choice = precision.choose_attention(model, torch.rand(2, 1, 8, 8), "fp32")
    assert choice.path == path and choice.ratio == pytest.approx(fused_time)
    assert len(choice.layers) == 2
    assert all(block.attn.fused_attn is (path == "fused") for block in model.blocks)


def test_timing_leaves_the_model_as_found():
    model = tiny_vit(8, 2, 1, 10, depth=2).eval()
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    choice = precision.choose_attention(model, torch.rand(2, 1, 8, 8, generator=torch.Generator()), "auto", repeats=1)
    assert choice.path in ("fused", "explicit")
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())


def test_flags_come_back_after_an_error():
    model = tiny_vit(8, 2, 1, 10, depth=2)
    before = [block.attn.fused_attn for block in model.blocks]
    with pytest.raises(Exception):
        precision.choose_attention(model, torch.rand(2, 7, 8, 8), "fp32")
    assert [block.attn.fused_attn for block in model.blocks] == before


def test_a_model_without_attention_is_left_alone():
    assert precision.choose_attention(nn.Linear(2, 2), torch.rand(1, 2)).path == "unchanged"


def test_convolutions_with_untrusted_bf16_gradients_are_named():
    import timm

    from vitkit.train.precision import needs_fp32

    net = timm.create_model("resnet18", num_classes=2, in_chans=1).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = needs_fp32(net, torch.rand(2, 1, 8, 8))
    assert "layer3.0.conv1" in found and "layer1.0.conv1" not in found
    assert not needs_fp32(net, torch.rand(2, 1, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_auto_trains_in_fp32_where_bf16_gradients_cannot_be_trusted():
    import timm

    from vitkit.tasks import Classify
    from vitkit.train import Supervised, TrainSettings, fit

    net = timm.create_model("resnet10t", num_classes=2, in_chans=1)
    batches = [{"images": torch.rand(8, 1, 4, 4), "labels": torch.arange(8) % 2}] * 2
    history = fit(Supervised(net, Classify(("a", "b"))), batches, settings=TrainSettings(epochs=1, batch_size=8))
    assert history.precision == "fp32"
