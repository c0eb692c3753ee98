"""ClusterViG: sizes, schedule, heads and timm's contract."""

from __future__ import annotations

import pytest
import timm
import torch

import vitkit  # noqa: F401 - registers the networks
from vitkit.errors import BadInput
from vitkit.testing import check_backbone


@pytest.mark.parametrize(("chans", "size"), [(1, 28), (5, 8)])
def test_timms_contract(chans, size):
    found = check_backbone("clustervig_femto", image_size=size, in_chans=chans, img_size=size)
    assert "reset_classifier" in found.passed


def test_the_papers_shapes():
    model = timm.create_model("clustervig_ti")
    assert [stage.mixer.k for stage in model.stages] == [9, 9, 10, 11, 12, 13, 13, 14, 15, 16, 17, 18]
    assert all(stage.mixer.clusters == 4 for stage in model.stages) and model.pos_embed.shape == (1, 192, 14, 14)
    halvings = [m.stride for m in model.stem if isinstance(m, torch.nn.Conv2d)]
    assert halvings == [(2, 2)] * 4 + [(1, 1)] and model.head_hidden_size == 1024
    fine = timm.create_model("clustervig_ti", patch=8, clusters=6, depth=1)
    assert fine.pos_embed.shape == (1, 192, 28, 28) and fine.stages[0].mixer.clusters == 6


def test_features_are_taken_from_blocks_and_positions_follow_the_image():
    model = timm.create_model("clustervig_femto", features_only=True, out_indices=(1, 3)).eval()
    for size, grid in (((32, 32), (8, 8)), ((28, 40), (7, 10))):
        assert [tuple(m.shape[1:]) for m in model(torch.randn(1, 3, *size))] == [(64, *grid)] * 2


def test_evaluation_repeats_itself_and_every_parameter_learns():
    torch.manual_seed(0)
    model = timm.create_model("clustervig_femto", num_classes=3)
    images = torch.randn(6, 3, 32, 32)
    model.train()
    (model(images) * torch.randn(6, 3)).sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        assert torch.allclose(model(images)[:2], model(images[:2]), atol=1e-4)


def test_the_distilled_head_averages_unless_a_teacher_listens():
    torch.manual_seed(0)
    model = timm.create_model("clustervig_femto", num_classes=3, distilled=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        assert torch.allclose(model(images), (model.head(pooled) + model.head_dist(pooled)) / 2)
        model.set_distilled_training()
        assert model(images).shape == (2, 3)
        logits, distilled = model.train()(images)
    assert logits.shape == distilled.shape == (2, 3) and not torch.equal(logits, distilled)
    model.reset_classifier(7)
    assert model.eval()(images).shape == (2, 7)


def test_bad_options_are_refused():
    with pytest.raises(BadInput, match="power of two"):
        timm.create_model("clustervig_femto", patch=6)
