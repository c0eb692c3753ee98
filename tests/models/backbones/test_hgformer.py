"""HGFormer: a pyramid whose class token builds the hyperedges of every block."""

from __future__ import annotations

import pytest
import timm
import torch

import vitkit  # noqa: F401 - registers the networks
from vitkit.errors import BadInput
from vitkit.models.backbones.pyramid import TokenBlock
from vitkit.testing import check_backbone


@pytest.mark.parametrize(("chans", "size"), [(1, 28), (5, 8)])
def test_timms_contract(chans, size):
    assert "reset_classifier" in check_backbone("hgformer_femto", image_size=size, in_chans=chans, img_size=size).passed


def test_maps_halve_each_side_and_any_size_runs():
    model = timm.create_model("hgformer_femto", features_only=True).eval()
    maps = model(torch.randn(1, 3, 28, 36))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 14, 18), (64, 7, 9), (96, 4, 5), (128, 2, 3)]


def test_hyperedges_of_the_stages():
    model = timm.create_model("hgformer_tiny")
    mixers = [next(b.block.attn for b in stage.blocks if isinstance(b, TokenBlock)) for stage in model.stages]
    patches = (3136, 784, 196, 49)
    assert [m.counts(n) for m, n in zip(mixers, patches)] == [(64, 98), (64, 24), (49, 8), (24, 4)]


def test_centres_follow_the_class_token():
    torch.manual_seed(0)
    model = timm.create_model("hgformer_femto").eval()
    images, chosen = torch.randn(1, 3, 32, 32), []
    first = next(b.block.attn for b in model.stages[0].blocks if isinstance(b, TokenBlock))
    original = first.hypergraph
    first.hypergraph = lambda x, layout: chosen.append(original(x, layout)) or chosen[-1]
    with torch.no_grad():
        for _ in range(2):
            model(images)
            torch.nn.init.normal_(model.cls_token)
    assert not torch.equal(chosen[0].centers.sort(1).values, chosen[1].centers.sort(1).values)


def test_gradients_and_bfloat16():
    torch.manual_seed(0)
    model = timm.create_model("hgformer_femto", num_classes=3, global_pool="avg").train()
    images = torch.randn(4, 3, 32, 32)
    model(images).square().sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    # the last block's class token is the only row that the mean over patches does not read
    assert {n for n, _ in model.named_parameters()} == reached
    half = timm.create_model("hgformer_femto", num_classes=3).to(torch.bfloat16).train()
    half(images.bfloat16()).float().square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in half.parameters() if p.grad is not None)


def test_bad_options_are_refused():
    with pytest.raises(BadInput, match="patch=8"):
        timm.create_model("hgformer_femto", patch=8)
