"""The U-Net of scans: pixels and images, skips, sizes, training."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

import vitkit  # noqa: F401 - registers the networks
from vitkit.errors import BadInput, UnknownName
from vitkit.models.backbones.mamba_unet import SKIPS, MambaUNet, PatchExpanding, SkipFusion
from vitkit.models.backbones.vmamba import PatchMerging
from vitkit.testing import check_backbone


def small(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "in_chans": 2, "num_classes": 3, "dims": (8, 12, 16), "depths": (1, 1, 1), "patch": 2}
    net = MambaUNet(**{**sizes, "d_state": 4, **options})
    torch.nn.init.normal_(net.head.weight)
    return net


@pytest.mark.parametrize(("chans", "side"), [(1, 28), (3, 32), (5, 8)])
def test_timms_contract(chans, side):
    report = check_backbone("mamba_unet_femto", image_size=side, in_chans=chans, img_size=side)
    assert "reset_classifier" in report.passed


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("size", [(16, 16), (10, 14), (2, 6)])
def test_every_pixel_has_its_logits_and_their_mean_is_the_images(skip, size):
    net = small(skip=skip).eval()
    images = torch.randn(2, 2, *size)
    with torch.no_grad():
        pixels = net.forward_pixels(images)
        assert pixels.shape == (2, 3, *size)
        assert torch.allclose(pixels.mean((2, 3)), net(images), atol=1e-4)
        assert net.forward_features(images).shape == (2, 8, *size)


def test_maps_of_the_encoder():
    net = timm.create_model("mamba_unet_femto", in_chans=1, features_only=True).eval()
    images = torch.randn(1, 1, 28, 36)
    maps = net(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 14, 18), (64, 7, 9), (128, 4, 5)]
    assert net.feature_info.channels() == [32, 64, 128] and net.feature_info.reduction() == [2, 4, 8]
    assert not len(net.model.decoder), "nothing is kept that features do not need"
    whole = timm.create_model("mamba_unet_femto", in_chans=1).eval()
    last, found = whole.forward_intermediates(images, norm=True)
    assert torch.equal(last, whole.forward_features(images)) and found[2].shape[1:] == (128, 4, 5)


@pytest.mark.parametrize("skip", SKIPS)
def test_the_encoders_maps_reach_the_decoder_of_their_size(skip):
    net = small(skip=skip).eval()
    state = net.begin(torch.randn(1, 2, 16, 16))
    for stage in net.stages:
        state = stage(state)
    assert [s.shape[1:] for s in state.skips] == [(8, 8, 8), (12, 4, 4)]
    up = net.decoder[0].up(state.inner.map)
    fused = net.decoder[0].fuse(up, state.skips[1])
    block = net.decoder[0].stage(state.inner._replace(map=fused)).map
    after = net.decoder[0](state)
    assert torch.allclose(after.inner.map, block, atol=1e-6)
    assert len(after.skips) == 1 and after.skips[0] is state.skips[0]
    # without the way through the bottom, the skips alone still tell where things are
    cut = state._replace(inner=state.inner._replace(map=torch.zeros_like(state.inner.map)))
    other = cut._replace(skips=(cut.skips[0], torch.randn_like(cut.skips[1])))
    assert not torch.allclose(net.decoder[0](cut).inner.map, net.decoder[0](other).inner.map, atol=1e-3)


def test_skip_fusions():
    x, skip = torch.randn(2, 2, 4, 3, 5).unbind(0)
    assert torch.equal(SkipFusion(4, "add")(x, skip), x + skip)
    assert torch.allclose(SkipFusion(4, "gate")(x, skip), (x + skip) / 2, atol=1e-6)
    concat = SkipFusion(4)
    expected = F.conv2d(torch.cat([x, skip], 1), concat.proj.weight, concat.proj.bias)
    assert torch.allclose(concat(x, skip), expected, atol=1e-6)


def test_expanding_lays_channels_out_in_space_and_can_undo_merging():
    up = PatchExpanding(5, 3, 2)
    x = torch.randn(2, 5, 4, 6)
    out = up(x)
    assert out.shape == (2, 3, 8, 12)
    raw = up.expansion.weight[:, :, 0, 0] @ x[0, :, 1, 2]
    # the channel c of the cell (i, j) of four is number 4c + 2i + j
    cell = F.layer_norm(raw.view(3, 2, 2)[:, 1, 0], (3,), up.norm.weight, up.norm.bias, up.norm.eps)
    assert torch.allclose(out[0, :, 3, 4], cell, atol=1e-5)
    merge, back = PatchMerging(3, 12), PatchExpanding(12, 3, 2)
    with torch.no_grad():
        merge.reduction.weight.copy_(torch.eye(12).view(12, 12, 1, 1))
        back.expansion.weight.copy_(torch.eye(12).view(12, 12, 1, 1))
        merge.norm, back.norm = torch.nn.Identity(), torch.nn.Identity()
        maps = torch.randn(1, 3, 4, 6)
        assert torch.equal(back(merge(maps)), maps)


@pytest.mark.parametrize("skip", SKIPS)
def test_all_parameters_learn(skip):
    net = small(skip=skip, depths=(2, 1, 1), drop_path_rate=0.1).train()
    F.cross_entropy(net.forward_pixels(torch.randn(4, 2, 16, 16)), torch.randint(3, (4, 16, 16))).backward()
    missed = [n for n, p in net.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 0]
    # what of a path is dropped for all four images at once is chance
    assert not missed


def test_learns_to_segment_what_needs_the_whole_image():
    """Bright pixels are class 1 if there are more of them in the left half, else class 2."""
    torch.manual_seed(0)
    images = torch.rand(48, 1, 8, 8)
    images[:24, ..., :4] += 0.4
    images[24:, ..., 4:] += 0.4
    bright = images[:, 0] > 0.7
    labels = bright.long() * torch.where(torch.arange(48) < 24, 1, 2)[:, None, None]
    net = small(img_size=8, in_chans=1, dims=(12, 16), depths=(1, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net.forward_pixels(images), labels).backward()
        optimizer.step()
    right = (net.eval().forward_pixels(images).argmax(1) == labels)[bright]
    assert float(right.float().mean()) > 0.9


def test_the_papers_size_and_errors():
    with torch.device("meta"):
        model = timm.create_model("mamba_unet_tiny", num_classes=1)
        added = timm.create_model("mamba_unet_tiny", num_classes=1, skip="add")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, added)]
    assert sizes[1] / 1e6 == pytest.approx(27.4, rel=0.02), "VM-UNet's"
    assert sizes[0] - sizes[1] == sum(2 * c * c + c for c in (96, 192, 384))
    with pytest.raises(UnknownName, match="concat"):
        small(skip="concatenate")
    with pytest.raises(BadInput, match="one stage fewer"):
        small(decoder_depths=(1,))
    with pytest.raises(BadInput, match="patches of 2"):
        small()(torch.randn(1, 2, 9, 8))


def test_bfloat16_trains_and_state_space_parameters_are_not_decayed():
    model = timm.create_model("mamba_unet_femto", num_classes=3)
    kept = [n for n, _ in model.named_parameters() if n.endswith(("A_log", "ssm.D", "dt_bias"))]
    assert len(kept) == 15 and set(kept) <= model.no_weight_decay()
    model = model.to(torch.bfloat16).train()
    model(torch.randn(4, 3, 32, 32, dtype=torch.bfloat16)).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
