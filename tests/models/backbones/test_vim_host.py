"""Vision Mamba on the plain host: sizes, blocks without MLP, slots that stay open."""

from __future__ import annotations

import pytest
import timm
import torch

import vitkit
from vitkit.models.parts.mixers.vim import Vim
from vitkit.models.vit import ViT
from vitkit.testing import check_backbone


@pytest.mark.parametrize(("chans", "side"), [(1, 28), (3, 32), (1, 8)])
def test_timms_contract(chans, side):
    assert "reset_classifier" in check_backbone("vim_femto", image_size=side, in_chans=chans, img_size=side).passed


@pytest.mark.parametrize(("name", "millions"), [("vim_tiny", 7), ("vim_small", 26)])
def test_the_papers_sizes(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


def test_a_block_is_its_mixer_and_the_class_token_is_in_the_middle():
    model = timm.create_model("vim_femto", img_size=28, in_chans=1, num_classes=3).eval()
    assert isinstance(model, ViT) and all(type(b.attn) is Vim for b in model.blocks)
    x, layout = model.embed(torch.randn(2, 1, 28, 28))
    block = model.blocks[0]
    assert torch.allclose(block(x, layout)[0], x + block.attn(block.norm1(x), layout), atol=1e-6)
    assert block.attn.line.paths(layout, 2, x.device).rows[24, 0] == 0
    assert model.global_pool == "token"
    assert {"blocks.0.attn.ssm.A_log", "pos_embed"} <= model.no_weight_decay()


def test_slots_stay_open():
    model = vitkit.build("vim_femto", img_size=8, in_chans=1, num_classes=3, mlp="interactive-ffn")
    record = vitkit.swap(model, "mixer", "ss2d", where="last:2", orders="raster,hilbert")
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert model.blocks[0].mlp.fc1.weight.grad is not None and record.touched == ("blocks.4.attn", "blocks.5.attn")


def test_other_image_sizes():
    model = timm.create_model("vim_femto", img_size=32, dynamic_img_size=True).eval()
    assert model(torch.randn(1, 3, 40, 24)).shape == (1, 1000)
