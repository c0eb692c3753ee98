"""TiMo: clips in two forms, dates, maps of the stages, units without leaks, and what it refuses."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitkit  # noqa: F401 - registers the networks
from vitkit.errors import BadInput
from vitkit.models.backbones.pyramid import State, from_tokens, to_tokens
from vitkit.models.backbones.timo import TiMo, _inside_units, cut_units, join_units
from vitkit.models.parts.mixers.stga import STGA
from vitkit.models.sincos import sincos_clip
from vitkit.testing import check_backbone

TINY = {"dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "attention": ("diff", "joint"), "mlp_ratio": 2.0}


def net(seed=0, **options) -> TiMo:
    torch.manual_seed(seed)
    return TiMo(**{**TINY, "in_chans": 6, "frames": 3, "num_classes": 4, **options}).eval()


def clip(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("size", "chans", "frames"), [(28, 1, 1), (32, 6, 2), (8, 3, 1), (33, 6, 3)])
def test_timms_contract(size, chans, frames):
    report = check_backbone("timo_femto", image_size=size, in_chans=chans, img_size=size, frames=frames)
    assert "reset_classifier" in report.passed


def test_the_papers_sizes():
    with torch.device("meta"):
        models = {size: timm.create_model(f"timo_{size}", num_classes=0) for size in ("tiny", "base", "large")}
    assert [f["num_chs"] for f in models["base"].feature_info] == [128, 256, 512, 1024]
    assert [f["num_chs"] for f in models["large"].feature_info] == [384, 768, 960, 1536]
    for model in models.values():
        kinds = [type(stage.blocks[0].block.attn) is STGA for stage in model.stages]
        assert kinds == [True, True, False, False] and model.stride == 32
        assert all(stage.blocks[0].block.attn.variant == "diff" for stage in model.stages[:2])
    assert [len(stage.blocks) - 1 for stage in models["base"].stages] == [2, 2, 18, 2]
    assert [stage.blocks[0].block.attn.num_heads for stage in models["large"].stages] == [6, 12, 24, 48]
    assert 90e6 < sum(p.numel() for p in models["base"].parameters()) < 92e6


def test_a_channel_axis_of_dates_is_a_clip_and_any_number_of_dates_goes():
    model, images = net(), clip(2, 3, 2, 16, 20)
    with torch.no_grad():
        assert torch.equal(model(images), model(images.flatten(1, 2)))
        assert model(clip(2, 5, 2, 16, 20)).shape == (2, 4)


def test_dates_are_read_and_default_to_their_index():
    model, images = net(), clip(2, 3, 2, 16, 16)
    index = torch.tensor([[0.0, 1.0, 2.0]]).expand(2, -1)
    with torch.no_grad():
        assert torch.equal(model(images), model(images, dates=index))
        other = torch.tensor([[0.0, 1.0, 2.0], [0.0, 30.0, 60.0]])
        moved = (model(images) - model(images, dates=other)).abs().amax(1)
        assert moved[0] < 1e-6 < 1e-5 < moved[1]
        maps = model.forward_intermediates(images, intermediates_only=True, dates=other)
        assert not torch.allclose(maps[0][1], model.forward_intermediates(images, intermediates_only=True)[0][1])


def test_half_of_the_positions_code_the_date_and_half_the_place():
    model, dates = net(), torch.tensor([[2.0, 9.0, 11.0]])
    images = clip(1, 3, 2, 12, 20)
    bare = torch.stack([model.stem.module(frame) for frame in images[0].unsqueeze(1)], 2)[0]
    codes = model.embed(images, dates)[0] - bare
    expected = sincos_clip(dates, (3, 5), 8)[0].transpose(1, 2).transpose(0, 1).reshape(8, 3, 3, 5)
    torch.testing.assert_close(codes, expected, atol=1e-5, rtol=0)


def test_frames_pass_the_stem_one_by_one_and_meet_in_the_attention():
    model, images = net(), clip(1, 3, 2, 16, 16)
    other = images.clone()
    other[:, 2] += 1
    with torch.no_grad():
        assert torch.equal(model.embed(images)[:, :, :2], model.embed(other)[:, :, :2])
        first, second = (model.stages[0](State(model.embed(x), None, {})).map for x in (images, other))
    assert not torch.allclose(first[:, :, 0], second[:, :, 0])


@pytest.mark.parametrize("fuse", ["mean", "concat"])
def test_maps_of_every_stage(fuse):
    model = timm.create_model(
        "timo_femto", in_chans=6, frames=3, fuse_frames=fuse, features_only=True, out_indices=(0, 1, 2)
    ).eval()
    maps = model(clip(2, 6, 28, 36))
    times = 3 if fuse == "concat" else 1
    assert [tuple(m.shape) for m in maps] == [(2, 48 * times, 7, 9), (2, 96 * times, 4, 5), (2, 192 * times, 2, 3)]
    assert model.feature_info.channels() == [48 * times, 96 * times, 192 * times]
    assert model.feature_info.reduction() == [4, 8, 16]


def test_concatenated_maps_average_to_the_fused_ones_and_are_normalised():
    model, images = net(fuse_frames="concat"), clip(2, 3, 2, 16, 16)
    with torch.no_grad():
        last, maps = model.forward_intermediates(images, norm=True)
        by_date = [m.unflatten(1, (3, -1)) for m in maps]
        for m in by_date:
            torch.testing.assert_close(m.mean(2), torch.zeros_like(m.mean(2)), atol=1e-5, rtol=0)
        torch.testing.assert_close(by_date[-1].mean(1), last)
        model.fuse_frames = "mean"
        torch.testing.assert_close(by_date[0].mean(1), model.forward_intermediates(images, intermediates_only=True)[0])


def test_one_image_is_a_clip_of_one_date_under_ordinary_attention():
    images = clip(2, 3, 16, 16)
    gyroscope, ordinary = (net(in_chans=3, frames=1, attention=(kind, "joint")) for kind in ("diff", "joint"))
    ordinary.load_state_dict({k: v for k, v in gyroscope.state_dict().items() if "difference" not in k})
    torch.testing.assert_close(gyroscope(images), ordinary(images))


def test_all_weights_learn_from_clips():
    model = net().train()
    model(clip(2, 3, 2, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = net().to(torch.bfloat16)
    out = model(clip(2, 3, 2, 16, 16).to(torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@given(b=st.integers(1, 2), t=st.integers(1, 3), h=st.integers(1, 3), w=st.integers(1, 3), side=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_units_are_the_squares_of_the_frames_and_join_again(b, t, h, w, side):
    maps = torch.randn(b, 5, t, h * side, w * side)
    units = cut_units(maps, side)
    assert torch.equal(join_units(units, (t, h, w)), maps)
    for index, (date, row, col) in enumerate((i, j, k) for i in range(t) for j in range(h) for k in range(w)):
        square = maps[:, :, date, row * side : (row + 1) * side, col * side : (col + 1) * side]
        assert torch.equal(units[:, index], square)


def test_maps_of_clips_are_tokens_of_a_grid_of_three_axes():
    state = State(torch.randn(2, 8, 3, 5, 7), None, {})
    x, layout = to_tokens(state)
    assert layout.grid == (3, 5, 7) and x.shape == (2, 105, 8)
    assert torch.equal(x[:, 35 + 2 * 7 + 4], state.map[:, :, 1, 2, 4])
    assert torch.equal(from_tokens(x, layout, state).map, state.map)
    places = layout.coordinates()
    assert places.shape == (105, 2) and torch.equal(places[:35], places[35:70])


def test_one_unit_that_is_the_whole_image_is_the_network_itself():
    model, images = net(attention=("joint", "joint")), clip(2, 3, 2, 16, 16)
    everything = torch.arange(3).expand(2, -1)
    with torch.no_grad():
        tokens = model.encode_units(images, everything, 16)
        expected = model.stages[1](model.stages[0](model.begin(images))).map
    torch.testing.assert_close(tokens, expected.flatten(2).transpose(1, 2))


def test_hidden_pixels_never_reach_the_encoder():
    model, images = net(), clip(2, 3, 2, 16, 24)
    visible = torch.tensor([[0, 3, 9, 17], [1, 2, 3, 16]])
    dates = torch.tensor([[0.0, 3.0, 7.0]]).expand(2, -1)
    first = model.encode_units(images, visible, 8, dates)
    assert first.shape == (2, 4, 16)
    shown = torch.zeros(2, 18, dtype=torch.bool).scatter(1, visible, True)
    per_pixel = shown.view(2, 3, 1, 2, 3).repeat_interleave(8, 3).repeat_interleave(8, 4)
    broken = images.masked_fill(~per_pixel, float("nan"))
    torch.testing.assert_close(model.encode_units(broken, visible, 8, dates), first)
    # in training mode neither, through batch statistics
    model.train()
    torch.testing.assert_close(
        model.encode_units(broken, visible, 8, dates), model.encode_units(images, visible, 8, dates)
    )


def test_units_meet_in_the_attention_only():
    model = net().eval()
    units = torch.randn(2, 8, 5, 4, 4)
    other = units.clone()
    other[:, :, 3] = torch.randn(2, 8, 4, 4)

    def touched():
        with torch.no_grad():
            a, b = (_inside_units(model.stages[1], _inside_units(model.stages[0], u)) for u in (units, other))
        return ((a - b).abs().amax((0, 1, 3, 4)) > 1e-6).nonzero().flatten().tolist()

    assert touched() == [0, 1, 2, 3, 4]
    for stage in model.stages:
        for block in stage.blocks[:-1]:
            torch.nn.init.zeros_(block.block.attn.proj.weight)
    assert touched() == [3]


def test_refusals():
    with pytest.raises(BadInput, match="frames=4 does not divide the 6 channels.*frames=3 would"):
        net(frames=4)
    with pytest.raises(BadInput, match=r"takes images \(B, 6, H, W\), or \(B, T, 2, H, W\)"):
        net()(clip(1, 5, 16, 16))
    with pytest.raises(BadInput, match="at least 4×4"):
        net()(clip(1, 6, 3, 16))
    with pytest.raises(BadInput, match=r"dates has shape \(1, 2\).*\(1, 3\)"):
        net()(clip(1, 6, 16, 16), dates=torch.zeros(1, 2))
    with pytest.raises(BadInput, match="must name one of"):
        net(attention=("diff", "dif"))
    with pytest.raises(BadInput, match="multiple of 8"):
        net(dims=(12, 16))
    with pytest.raises(BadInput, match="as many stages"):
        net(depths=(1,))
    with pytest.raises(BadInput, match="'mean' or 'concat'"):
        net(fuse_frames="max")
    with pytest.raises(BadInput, match="series of frames=3 dates, not 2"):
        net(fuse_frames="concat")(clip(1, 2, 2, 16, 16))
