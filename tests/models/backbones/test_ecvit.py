"""ECViT: sizes, what its class token is, and what it refuses."""

from __future__ import annotations

import pytest
import timm
import torch

import vitkit  # noqa: F401 - registers the networks
from vitkit.errors import BadInput
from vitkit.testing import check_backbone


@pytest.mark.parametrize("chans", [1, 3, 5])
def test_timms_contract(chans):
    assert "reset_classifier" in check_backbone("ecvit_femto", image_size=28, in_chans=chans, img_size=28).passed


def test_the_papers_budget():
    model = timm.create_model("ecvit_tiny", num_classes=10)
    assert 4.8e6 < sum(p.numel() for p in model.parameters()) < 5.1e6


def test_merging_halves_each_side_upwards():
    model = timm.create_model("ecvit_femto", img_size=(28, 36), in_chans=1, features_only=True, out_indices=(0, 1, 2))
    maps = model.eval()(torch.randn(1, 1, 28, 36))
    assert [tuple(m.shape[1:]) for m in maps] == [(48, 7, 9), (96, 4, 5), (192, 2, 3)]


def test_bfloat16_and_train_mode():
    model = timm.create_model("ecvit_femto", num_classes=3).to(torch.bfloat16).train()
    model(torch.randn(4, 3, 32, 32, dtype=torch.bfloat16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_other_sizes_are_refused_by_name():
    with pytest.raises(BadInput, match="multiple of 8"):
        timm.create_model("ecvit_tiny", img_size=100)
    with pytest.raises(BadInput, match="built for images of 32×32"):
        timm.create_model("ecvit_femto")(torch.randn(1, 3, 28, 28))
