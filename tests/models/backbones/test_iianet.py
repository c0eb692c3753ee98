"""iiANET: the published sizes, other image sizes, and where its branches meet."""

from __future__ import annotations

import pytest
import timm
import torch

import vitkit  # noqa: F401 - registers the networks
from vitkit.errors import BadInput
from vitkit.models.backbones.iianet import IIANet
from vitkit.testing import check_backbone


@pytest.mark.parametrize(("size", "chans"), [(28, 1), (8, 3), (28, 5)])
def test_timms_contract(size, chans):
    assert "reset_classifier" in check_backbone("iianet_femto", size, chans, img_size=size).passed


def test_the_published_network_has_its_parameters_and_maps():
    with torch.device("meta"):
        plain = timm.create_model("iianet_base", num_classes=37, registers=0)
        model = timm.create_model("iianet_base", features_only=True)
        maps = model.eval()(torch.empty(1, 3, 299, 299))
        tiny = timm.create_model("iianet_tiny")
    # the published file's, without its registers, which grow with the fourth power of a map's side
    assert sum(p.numel() for p in plain.parameters()) == 25_316_781
    assert [tuple(m.shape[1:]) for m in maps] == [(192, 73, 73), (320, 36, 36), (768, 18, 18), (1280, 9, 9)]
    assert [info["num_chs"] for info in tiny.feature_info] == [96, 160, 384, 640]


def test_registers_add_keys_and_values_of_every_head():
    def count(n):
        model = timm.create_model("iianet_femto", registers=n)
        return sum(p.numel() for p in model.parameters())

    # two numbers a channel of each attention: 48, 64, 96 and 128 channels come in, an eighth goes there
    assert count(3) - count(0) == 3 * 2 * (6 + 8 + 12 + 16)


def test_other_sizes_than_the_table_was_made_for():
    model = timm.create_model("iianet_femto", num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model(torch.randn(2, 3, 28, 44)).shape == (2, 3)
    other = timm.create_model("iianet_femto", num_classes=3, img_size=48).eval()
    state = {k: v for k, v in model.state_dict().items() if ".rel_" not in k}
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    assert other(x).shape == (2, 3)


def test_branches_meet_in_the_gates_only():
    torch.manual_seed(0)
    model = timm.create_model("iianet_femto", widths=((8, 8), (8,)), num_heads=(1, 1), num_classes=0).eval()
    x = torch.randn(1, 48, 8, 8, requires_grad=True)
    first = torch.nn.Sequential(*(block.module for block in model.stages[0].blocks))(x)
    (grad,) = torch.autograd.grad(first[:, :8].square().sum(), x, retain_graph=True)
    assert bool(grad[:, :6].any()) and not grad[:, 6:].any()
    gated = model.stages[1].down(first)
    (grad,) = torch.autograd.grad(gated[:, :8].square().sum(), x)
    assert bool(grad[:, 6:].any())


def test_bfloat16_and_train_mode():
    model = timm.create_model("iianet_femto", num_classes=3).to(torch.bfloat16).train()
    model(torch.randn(4, 3, 32, 32, dtype=torch.bfloat16)).sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_positions_and_registers_are_not_decayed():
    names = timm.create_model("iianet_femto").no_weight_decay()
    assert {n.rpartition(".")[2] for n in names} == {"rel_h", "rel_w", "register_kv"} and len(names) == 12


def test_images_that_vanish_are_refused_with_a_size_that_works():
    smallest = 39
    with pytest.raises(BadInput, match=f"at least {smallest}×{smallest}"):
        timm.create_model("iianet_tiny", img_size=smallest - 1)
    model = timm.create_model("iianet_tiny", img_size=smallest, num_classes=2).eval()
    assert model(torch.randn(1, 3, smallest, smallest)).shape == (1, 2)
    with pytest.raises(BadInput, match="vanish"):
        model(torch.randn(1, 3, smallest, smallest - 1))
    with pytest.raises(BadInput, match="at least 7×7"):
        timm.create_model("iianet_femto", img_size=6)
    assert timm.create_model("iianet_femto", img_size=7).eval()(torch.randn(1, 3, 7, 7)).shape == (1, 1000)
    with pytest.raises(BadInput, match="one number for each of the 4 stages"):
        IIANet(num_heads=(1, 2))
