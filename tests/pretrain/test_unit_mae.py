"""Block-masked autoencoding: what is hidden, what is seen, what is counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.errors import BadInput
from vitkit.models.backbones.timo import TiMo
from vitkit.models.build import build
from vitkit.models.normalized import NormalizedModel
from vitkit.pretrain.mae import MAE
from vitkit.pretrain.masking import num_visible
from vitkit.pretrain.patches import patchify
from vitkit.pretrain.unit_mae import UnitMAE, unit_cells
from vitkit.testing import check_objective


def net(**options) -> TiMo:
    torch.manual_seed(0)
    sizes = {"dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "attention": ("diff", "joint"), "mlp_ratio": 2.0}
    return TiMo(**{**sizes, "in_chans": 6, "frames": 3, "num_classes": 4, **options})


def series(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@given(t=st.integers(1, 3), rows=st.integers(1, 3), cols=st.integers(1, 3), side=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_the_cells_of_units_are_all_cells_once_and_those_of_their_squares(t, rows, cols, side):
    table = unit_cells((t, rows, cols), side)
    assert table.flatten().sort().values.tolist() == list(range(t * rows * cols * side**2))
    for index, (date, row, col) in enumerate((i, j, k) for i in range(t) for j in range(rows) for k in range(cols)):
        corner = (date * rows * side + row * side) * cols * side + col * side
        square = [corner + i * cols * side + j for i in range(side) for j in range(side)]
        assert table[index].tolist() == square


@pytest.mark.parametrize("unit", [8, 16])
def test_whole_units_are_hidden_in_every_frame_others(unit):
    mae = UnitMAE(net(), unit=unit)
    out = mae({"images": series(2, 6, 32, 32)})
    cells, side = 32 // 8, unit // 8
    assert out["output"].shape == (2, 3 * cells**2, 8 * 8 * 2)
    mask = out["mask"].view(2, 3, cells // side, side, cells // side, side)
    by_unit = mask.movedim(4, 3).flatten(4)
    assert (by_unit.all(-1) == by_unit.any(-1)).all()
    count = 3 * (cells // side) ** 2
    assert (by_unit.any(-1).flatten(1).sum(1) == count - num_visible(count, 0.75)).all()
    torch.manual_seed(0)
    drawn = [mae({"images": series(1, 6, 32, 32)})["mask"].view(3, -1) for _ in range(8)]
    assert any(not torch.equal(m[0], m[1]) for m in drawn)


def test_only_visible_units_pass_the_stages():
    mae, seen = UnitMAE(net()), []
    for stage in mae.model.stages:
        stage.blocks[0].block.norm1.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    mae({"images": series(2, 6, 32, 32)})
    units = num_visible(3 * 16, 0.75)
    assert seen == [4 * units, units]


def test_hidden_pixels_change_nothing_that_is_predicted():
    mae = UnitMAE(net()).eval()
    clip = series(2, 3, 2, 16, 16)
    visible = torch.tensor([[0, 5, 11], [2, 3, 7]])
    first, mask = mae.reconstruct(clip, visible=visible)
    rows = patchify(clip.flatten(0, 1), (8, 8)).unflatten(0, (2, 3)).flatten(1, 2)
    assert not mask.gather(1, visible).any() and mask.sum() == 2 * 9
    hidden = torch.where(mask.unsqueeze(-1), torch.full_like(rows, float("inf")), rows)
    square = hidden.view(2, 3, 2, 2, 8, 8, 2).permute(0, 1, 6, 2, 4, 3, 5).reshape(clip.shape)
    torch.testing.assert_close(mae.reconstruct(square, visible=visible)[0], first)


def test_visible_tokens_stand_at_their_own_places_in_any_order():
    mae = UnitMAE(net(), unit=16).eval()
    clip = series(1, 3, 2, 32, 32)
    orders = [torch.tensor([[1, 6, 10]]), torch.tensor([[10, 1, 6]])]
    (one, mask), (two, same) = (mae.reconstruct(clip, visible=v) for v in orders)
    assert torch.equal(mask, same)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    # a decoder that hands its tokens on shows each of them at its cell
    mae.decoder.blocks, mae.decoder.norm, mae.decoder.pixels = (torch.nn.Identity() for _ in range(3))
    out, _ = mae.reconstruct(clip, visible=orders[1])
    tokens = mae.decoder.project(mae.model.encode_units(clip, orders[1], 16))
    cells = unit_cells((3, 2, 2), 2)[orders[1]].flatten(1)
    without = out.gather(1, cells.unsqueeze(-1).expand_as(tokens)) - tokens
    from vitkit.models.sincos import sincos_clip

    codes = sincos_clip(torch.arange(3).unsqueeze(0), (4, 4), mae.decoder.width).flatten(1, 2)
    torch.testing.assert_close(without, codes.gather(1, cells.unsqueeze(-1).expand_as(tokens)), atol=1e-5, rtol=0)


def test_dates_reach_encoder_and_decoder():
    mae, clip = UnitMAE(net()).eval(), series(1, 3, 2, 16, 16)
    visible = torch.tensor([[0, 5, 11]])
    index = torch.tensor([[0.0, 1.0, 2.0]])
    usual = mae.reconstruct(clip, visible=visible)[0]
    assert torch.equal(usual, mae.reconstruct(clip, index, visible)[0])
    assert not torch.allclose(usual, mae.reconstruct(clip, 9 * index, visible)[0])
    batch = {"images": clip, "dates": 9 * index}
    torch.manual_seed(4)
    late = mae(batch)["loss"]
    torch.manual_seed(4)
    assert late != mae({"images": clip})["loss"]


def test_loss_counts_hidden_cells_and_real_pixels_only():
    mae = UnitMAE(net(), norm_pix=False).eval()
    clip = series(2, 3, 2, 12, 20)
    torch.manual_seed(1)
    prediction, mask = mae.reconstruct(clip)
    target, real = mae.target(clip)
    assert target.shape == prediction.shape == (2, 3 * 2 * 3, 128) and real.shape == (1, 18, 128)
    # 12×20 pixels lie on 16×24
    assert real.sum() == 3 * 12 * 20 * 2
    loss = mae.loss(prediction, target, real, mask)
    by_hand = torch.stack(
        [(prediction[b, n] - target[b, n])[real[0, n] > 0].square().mean() for b, n in mask.nonzero()]
    ).mean()
    torch.testing.assert_close(loss, by_hand)
    elsewhere = 7 * (~mask).unsqueeze(-1) + 5 * (1 - real)
    torch.testing.assert_close(mae.loss(prediction + elsewhere, target, real, mask), loss)
    assert mae.loss(prediction, target, real, torch.zeros_like(mask)) == 0


def test_targets_are_normalised_over_their_real_pixels_and_equal_those_of_mae():
    target, real = UnitMAE(net()).target(series(2, 3, 2, 12, 20))
    count = real.sum(-1)
    torch.testing.assert_close((target * real).sum(-1) / count, torch.zeros(2, 18), atol=1e-5, rtol=0)
    variance = (target.square() * real).sum(-1) / (count - 1)
    torch.testing.assert_close(variance, torch.ones(2, 18), atol=1e-3, rtol=0)
    images = series(2, 3, 16, 16)
    vit = build("vit_femto", img_size=16, patch_size=4, num_classes=3)
    torch.testing.assert_close(UnitMAE(vit, unit=8).target(images.unsqueeze(1))[0], MAE(vit).target(images))


def test_cells_of_padding_alone_do_not_count():
    mae = UnitMAE(net(), unit=16)
    out = mae({"images": series(2, 6, 18, 18)})
    _, real = mae.target(series(2, 3, 2, 18, 18))
    assert (real.sum(-1) == 0).sum() == 3 * (16 - 9)
    assert out["loss"].isfinite()
    out["loss"].backward()
    assert all(p.grad.isfinite().all() for p in mae.decoder.parameters())


def test_pretraining_lowers_the_loss_and_moves_the_encoder():
    model = NormalizedModel(net(), [0.5] * 6, [0.25] * 6)
    mae = UnitMAE(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(mae.parameters(), lr=2e-3)
    batch, losses = {"images": series(8, 3, 2, 16, 16).round()}, []
    for _ in range(40):
        torch.manual_seed(3)
        loss = mae(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert mae.encoder() is model
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert any("stages.0.blocks.0.block.attn.qkv" in k for k in moved) and any("stem" in k for k in moved)
    assert not any("head" in k or "difference.0" in k for k in moved)


def test_plain_vits_hide_squares_of_patches():
    assert "gradients reach the encoder" in check_objective(UnitMAE).passed
    vit = build("vit_femto", img_size=32, patch_size=4, num_classes=3).eval()
    mae = UnitMAE(NormalizedModel(vit, [0.5] * 3, [0.25] * 3)).eval()
    assert mae.unit == 16
    out = mae({"images": series(2, 3, 32, 32)})
    blocks = out["mask"].view(2, 2, 4, 2, 4).movedim(3, 2).flatten(3)
    assert (blocks.all(-1) == blocks.any(-1)).all() and out["output"].shape == (2, 64, 48)
    # the visible tokens are those that MAE computes
    visible = torch.tensor([[3, 0], [2, 1]])
    cells = unit_cells((1, 2, 2), 4)[visible].flatten(1)
    images = series(2, 3, 32, 32)
    tokens = mae._encode(images.unsqueeze(1), visible, cells, None)
    from vitkit.pretrain.mae import run_visible

    x, layout = run_visible(vit, *vit.embed(images), cells)
    torch.testing.assert_close(tokens, vit.norm(x)[:, layout.num_prefix :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_of_the_model(dtype):
    mae = UnitMAE(net().to(dtype))
    out = mae({"images": series(2, 6, 16, 16).to(dtype)})
    assert {p.dtype for p in mae.parameters()} == {dtype} == {out["output"].dtype}
    out["loss"].backward()


def test_the_papers_decoder_for_the_papers_sizes():
    with torch.device("meta"):
        mae = UnitMAE(TiMo(num_classes=0))
    assert (mae.unit, mae.decoder.width, len(mae.decoder.blocks)) == (32, 512, 8)
    assert mae.decoder.blocks[0].attn.num_heads == 16 and mae.decoder.pixels.out_features == 32 * 32 * 3


def test_refusals():
    with pytest.raises(BadInput, match="mask_ratio=1"):
        UnitMAE(net(), mask_ratio=1)
    with pytest.raises(BadInput, match="unit=12 must be a multiple of 8 pixels.*16 would do"):
        UnitMAE(net(), unit=12)
    with pytest.raises(BadInput, match="multiple of 8"):
        UnitMAE(net(), decoder_dim=36)
    with pytest.raises(BadInput, match="single unit of 8"):
        UnitMAE(net(in_chans=2, frames=1))({"images": series(1, 2, 8, 8)})
    with pytest.raises(TypeError, match="holds none"):
        UnitMAE(torch.nn.Linear(2, 2))
    vit = build("vit_femto", img_size=(12, 20), patch_size=4, num_classes=3)
    with pytest.raises(BadInput, match="8 pixels do not divide 12×20; use unit=4"):
        UnitMAE(vit, unit=8)({"images": series(1, 3, 12, 20)})
    with pytest.raises(BadInput, match="not series of 2 frames"):
        UnitMAE(vit)({"images": series(1, 2, 3, 12, 20)})
