from __future__ import annotations

import pytest
import timm
import torch

from vitkit import build, rehost
from vitkit.errors import BadInput, UnknownName
from vitkit.models.vit import ViT


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch32_clip_224",
    ],
)
def test_timm_vits_are_rehosted_without_copies(name):
    options = {"img_size": 56 if "14" in name else 64, "num_classes": 5, "depth": 2}
    theirs = timm.create_model(name, **options).eval()
    ours = rehost(theirs)
    assert isinstance(ours, ViT)
    assert type(theirs) is not ViT
    mine = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        assert mine[key] is parameter
    x = torch.randn(2, 3, options["img_size"], options["img_size"])
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_opening_a_slot_of_the_host_leaves_the_original_alone():
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    x = torch.randn(1, 3, 32, 32)
    before = theirs(x)
    ours = rehost(theirs)
    ours.blocks[0].mlp = torch.nn.Identity()
    ours.pos_embed = None
    torch.testing.assert_close(theirs(x), before)


def test_what_is_no_plain_vit_is_refused_by_name():
    with pytest.raises(BadInput, match="ResNet"):
        rehost(timm.create_model("resnet18"))
    with pytest.raises(BadInput, match="Distilled"):
        rehost(timm.create_model("deit_tiny_distilled_patch16_224", img_size=32))


def test_a_library_that_computes_something_else_is_noticed():
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    theirs.blocks[0].drop_path1 = torch.nn.Threshold(0.0, 3.0)
    theirs.forward_head = lambda x, pre_logits=False: theirs.head(x[:, 0]) + 1
    with pytest.raises(RuntimeError, match="differs from the original"):
        rehost(theirs)


def test_build_names():
    assert isinstance(build("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4), ViT)
    assert not isinstance(build("resnet10t", num_classes=4), ViT)
    with pytest.raises(UnknownName, match="vit_pico"):
        build("vit_picco")
