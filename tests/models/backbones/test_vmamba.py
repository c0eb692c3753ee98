"""VMamba: sizes, patch merging, image sizes, weight decay."""

from __future__ import annotations

import pytest
import timm
import torch

import vitkit  # noqa: F401 - registers the networks
from vitkit.errors import BadInput
from vitkit.models.backbones.vmamba import PatchMerging
from vitkit.testing import check_backbone
from vitkit.train.optimizers.choose import param_groups


@pytest.mark.parametrize(("chans", "side"), [(1, 28), (3, 32), (5, 8)])
def test_timms_contract(chans, side):
    assert "reset_classifier" in check_backbone("vmamba_femto", image_size=side, in_chans=chans, img_size=side).passed


@pytest.mark.parametrize(("name", "millions"), [("vmamba_tiny", 22), ("vmamba_small", 44), ("vmamba_base", 75)])
def test_the_papers_sizes(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


def test_other_image_sizes_than_the_one_it_was_made_for():
    model = timm.create_model("vmamba_femto", in_chans=1, features_only=True, out_indices=(0, 1, 2)).eval()
    maps = model(torch.randn(1, 1, 28, 36))
    assert [tuple(m.shape[1:]) for m in maps] == [(48, 7, 9), (96, 4, 5), (192, 2, 3)]
    with pytest.raises(BadInput, match="patches of 4"):
        model(torch.randn(1, 1, 30, 36))


def test_merging_puts_four_neighbours_side_by_side():
    merging = PatchMerging(3, 6)
    x = torch.randn(2, 3, 5, 4)
    out = merging(x)
    assert out.shape == (2, 6, 3, 2)
    four = x[:, :, 2:4, 0:2].flatten(1)
    normed = torch.nn.functional.layer_norm(four, (12,), merging.norm.weight, merging.norm.bias, merging.norm.eps)
    assert torch.allclose(out[:, :, 1, 0], normed @ merging.reduction.weight[:, :, 0, 0].T, atol=1e-5)


def test_state_space_parameters_are_not_decayed():
    model = timm.create_model("vmamba_femto")
    plain = {id(p) for p in param_groups(model, 0.05)[1]["params"]}
    named = dict(model.named_parameters())
    kept = [n for n in named if n.endswith(("A_log", "ssm.D", "dt_bias"))]
    assert len(kept) == 12 and set(kept) <= model.no_weight_decay()
    assert all(id(named[n]) in plain for n in kept)


def test_bfloat16_trains():
    model = timm.create_model("vmamba_femto", num_classes=3).to(torch.bfloat16).train()
    model(torch.randn(4, 3, 32, 32, dtype=torch.bfloat16)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
