"""HgVT: the host with hypergraph blocks; its sizes, its retrieval vectors and timm's contract."""

from __future__ import annotations

import pytest
import timm
import torch

import vitkit
from vitkit.anatomy import Trace, check, host
from vitkit.models.vit import collect_aux
from vitkit.testing import check_backbone


def femto(**options):
    torch.manual_seed(0)
    return timm.create_model("hgvt_femto", **{"img_size": 28, "in_chans": 1, "num_classes": 5, **options}).eval()


@pytest.mark.parametrize(("chans", "size"), [(1, 28), (3, 32), (5, 8)])
def test_timms_contract(chans, size):
    assert "reset_classifier" in check_backbone("hgvt_femto", image_size=size, in_chans=chans, img_size=size).passed


def test_the_papers_sizes():
    for name, millions in (("hgvt_tiny", 7.7), ("hgvt_small", 22.9)):
        count = sum(p.numel() for p in timm.create_model(name).parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_permuting_patches_leaves_the_logits_without_positions():
    model = femto()
    torch.nn.init.zeros_(model.pos_embed)
    images = torch.randn(2, 1, 28, 28)
    order = torch.randperm(49, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x, layout = model.embed(images)
        plain, _ = model.run(x, layout)
        permuted, final = model.run(x[:, order], layout)
        num_prefix = final.num_prefix
        assert torch.allclose(permuted[:, num_prefix:], plain[:, num_prefix:][:, order], atol=1e-4)
        assert torch.allclose(model.readout(permuted, final), model(images), atol=1e-4)


def test_features_maps_and_prefix_tokens():
    model = femto(img_size=(28, 36))
    images = torch.randn(2, 1, 28, 36)
    assert model.num_prefix_tokens == 14 and model.forward_features(images).shape == (2, 14 + 63, 64)
    _, maps = model.forward_intermediates(images)
    assert [tuple(m.shape) for m in maps] == [(2, 64, 7, 9)] * 3
    features = timm.create_model("hgvt_femto", features_only=True, out_indices=(0, 2))
    assert [tuple(m.shape) for m in features(torch.randn(1, 3, 32, 32))] == [(1, 64, 8, 8)] * 2


def test_it_is_a_host_that_probes_can_look_into():
    model = femto()
    check(model)
    assert host(model) is model
    with Trace(model, ["blocks.*.resid_post", "logits"]) as trace:
        out = model(torch.randn(2, 1, 28, 28))
    assert torch.equal(trace["logits"], out) and trace["blocks.2.resid_post"].shape == (2, 63, 64)


def test_retrieval_vectors_are_of_length_one():
    model, images = femto(), torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        for concat, width in ((False, 64), (True, 128)):
            vectors = model.retrieval(images, concat)
            assert vectors.shape == (3, width)
            assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)


def test_both_losses_of_every_block_reach_the_training_loop():
    model = femto().train()
    with collect_aux(model) as aux:
        loss = model(torch.randn(2, 1, 28, 28)).sum()
    assert len(aux) == 6
    (loss + sum(aux.values())).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bfloat16_learns_and_build_knows_the_name():
    model = vitkit.build("hgvt_femto", img_size=28, in_chans=1, num_classes=3).to(torch.bfloat16).train()
    model(torch.randn(4, 1, 28, 28, dtype=torch.bfloat16)).float().square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_the_classifier_can_be_replaced_or_left_out():
    model = femto()
    model.reset_classifier(7)
    assert model(torch.randn(1, 1, 28, 28)).shape == (1, 7) and model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 28, 28)).shape == (1, model.head_hidden_size)
