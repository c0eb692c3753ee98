from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.backbones.mdcm_host import MDCM
from vitkit.models.labels import known_labels
from vitkit.models.vit import collect_aux
from vitkit.testing.checks import check_backbone

SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}


def swin(**options):
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **SWIN, **options)


def images(size=32, batch=2):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def direct(made, maps):
    """The head on maps (B, C, H, W)."""
    return made.head([m.flatten(2).transpose(1, 2) for m in maps], [tuple(m.shape[2:]) for m in maps])


def test_nhwc_and_nchw_maps_are_read_alike():
    torch.manual_seed(2)
    made = MDCM(swin(features_only=True), 5, dim=16).eval()
    assert made.nhwc
    maps = [m.permute(0, 3, 1, 2) for m in made.backbone(images())]
    torch.testing.assert_close(made(images()), direct(made, maps[1:]))
    whole = MDCM(swin(), 5, dim=16).eval()
    whole.head.load_state_dict(made.head.state_dict())
    torch.testing.assert_close(whole(images()), made(images()))


@pytest.mark.parametrize("name", ["convnext", "ecvit_femto", "resnet"])
def test_other_pyramids(name):
    torch.manual_seed(0)
    if name == "convnext":
        net = timm.create_model("convnext_atto", features_only=True, dims=(8, 8, 16, 16), depths=(1, 1, 1, 1))
    elif name == "resnet":
        net = timm.create_model("resnet10t", features_only=True, out_indices=(2, 3, 4))
    else:
        net = timm.create_model(name, features_only=True, img_size=64)
    made = MDCM(net, 5, dim=16).eval()
    assert not made.nhwc and len(made.picked) == 3
    torch.testing.assert_close(made(images(64)), direct(made, net(images(64))[-3:]))


def test_one_stage_that_keeps_all_is_the_last_stage_read_by_a_class_token():
    made = MDCM(swin(features_only=True), 5, stages=[-1], dim=16, keep=1.0, suppress=0.0).train()
    made.backbone.eval()
    with collect_aux(made) as aux:
        out = made(images())
    (x,), _ = made.stage_tokens(images())
    z = made.head.stages[0].read(made.head.stages[0].tokens(x))
    torch.testing.assert_close(out, made.head.classifiers[0](z))
    assert not aux


def test_losses_and_labels():
    made = MDCM(swin(features_only=True), 5, dim=16).train()
    labels = torch.tensor([0, 3])
    with collect_aux(made) as aux, known_labels(made, labels):
        made(images())
    assert set(aux) == {("mdcm_diversity", 0), ("mdcm_background", 0), ("mdcm_stages", 0)}
    torch.manual_seed(0)
    made.backbone.eval()
    with collect_aux(made) as aux:
        out = made(images(), target=labels)
    logits = made.head.stage_logits(made.forward_features(images(), target=labels))
    expected = sum(F.cross_entropy(logits[:, s], labels, label_smoothing=0.1) for s in range(3))
    torch.testing.assert_close(aux["mdcm_stages", 0], expected)
    (F.cross_entropy(out, labels) + sum(aux.values())).backward()
    missing = [n for n, p in made.named_parameters() if p.grad is None]
    assert not missing, missing


def test_cues_leave_the_mode_and_tell_every_stage():
    made = MDCM(swin(features_only=True), 5, dim=16).train()
    cues = made.cues(images(), torch.tensor([1, 2]))
    assert made.training and made.backbone.training
    assert [tuple(m.shape) for m in cues.maps] == [(2, 8, 8), (2, 4, 4), (2, 2, 2)]
    assert [k.shape[1] for k in cues.kept] == [16, 8, 3]
    assert cues.stage_logits.shape == (2, 3, 5)
    torch.testing.assert_close(made.eval()(images()), cues.logits)


@pytest.mark.parametrize("size", [32, 28, 8])
def test_small_size_conforms(size):
    assert "gradient checkpointing" in check_backbone("mdcm_femto", image_size=size, img_size=size).passed


def test_registered_networks():
    tiny = timm.create_model("mdcm_swin_tiny", num_classes=7, keep=0.5, img_size=64, window_size=2, embed_dim=24)
    assert tiny.head.keep == (0.5, 0.5, 0.5) and tiny.eval()(images(64)).shape == (2, 7)
    wide = timm.create_model("mdcm_convnext_tiny", num_classes=7, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    assert wide.eval()(images(64)).shape == (2, 7)
    with torch.device("meta"):
        base = timm.create_model("mdcm_swin_base", num_classes=200)
    assert [s.proj.in_features for s in base.head.stages] == [256, 512, 1024] and base.head.dim == 512
    with pytest.raises(BadInput, match="features_only"):
        timm.create_model("mdcm_femto", features_only=True)
    out = copy.deepcopy(tiny)
    out.reset_classifier(0)
    assert out(images(64)).shape == (2, 3 * 512)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(BadInput, match="features_only=True"):
        MDCM(torch.nn.Linear(2, 2), 5)
    with pytest.raises(BadInput, match="stages="):
        MDCM(swin(features_only=True), 5, stages=[4])
