"""The small hosts behave as timm's own networks."""

from __future__ import annotations

import pytest
import timm
import torch

import vitkit.models.presets  # noqa: F401 - registers the names
from vitkit.models.vit import ViT


@pytest.mark.parametrize("name", ["vit_femto", "vit_pico"])
def test_timm_builds_them_with_its_own_options(name):
    model = timm.create_model(name, num_classes=7, in_chans=1, img_size=28)
    assert isinstance(model, ViT) and model.num_classes == 7
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
    assert model.patch_embed.patch_size == (4, 4)


def test_features_only_gives_maps():
    model = timm.create_model("vit_femto", img_size=8, in_chans=1, features_only=True, out_indices=(1, 3))
    maps = model(torch.zeros(2, 1, 8, 8))
    assert [tuple(m.shape) for m in maps] == [(2, 64, 4, 4)] * 2
    assert model.feature_info.reduction() == [2, 2]


def test_there_are_no_pretrained_weights():
    with pytest.raises(ValueError, match="no pretrained weights"):
        timm.create_model("vit_pico", pretrained=True)
