from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitkit.models.build import build
from vitkit.models.normalized import NormalizedModel
from vitkit.pretrain.mae import MAE
from vitkit.pretrain.masking import num_visible, random_mask
from vitkit.pretrain.patches import patchify, unpatchify
from vitkit.pretrain.positions import sincos_2d


def model(**options):
    torch.manual_seed(0)
    defaults = {"img_size": (12, 20), "patch_size": 4, "in_chans": 3, "num_classes": 3}
    return build("vit_femto", **{**defaults, **options})


def batch(b=4, seed=1):
    return {"images": torch.rand(b, 3, 12, 20, generator=torch.Generator().manual_seed(seed))}


@given(h=st.integers(1, 4), w=st.integers(1, 4), ph=st.integers(1, 3), pw=st.integers(1, 3), c=st.integers(1, 5))
def test_patches_are_the_slices_of_the_image(h, w, ph, pw, c):
    x = torch.arange(2 * c * h * ph * w * pw, dtype=torch.float32).view(2, c, h * ph, w * pw)
    rows = patchify(x, (ph, pw))
    for i in range(h):
        for j in range(w):
            cell = x[:, :, i * ph : (i + 1) * ph, j * pw : (j + 1) * pw]
            assert torch.equal(rows[:, i * w + j], cell.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(rows, (ph, pw), (h, w)), x)


@given(n=st.integers(1, 60), ratio=st.sampled_from([0.0, 0.3, 0.6, 0.75, 0.9]), seed=st.integers(0, 20))
def test_masks_hide_exactly_their_share(n, ratio, seed):
    torch.manual_seed(seed)
    visible, mask = random_mask(3, n, ratio)
    assert visible.shape == (3, num_visible(n, ratio))
    assert (mask.sum(1) == n - visible.shape[1]).all()
    assert not mask.gather(1, visible).any()
    assert (visible.diff(dim=1) > 0).all()


def test_positions_are_the_sines_of_row_and_column():
    codes = sincos_2d((2, 3), 8)
    omega = [1.0, 0.01]
    for cell, (r, c) in enumerate((r, c) for r in range(2) for c in range(3)):
        expected = [f(torch.tensor(p * o)) for p in (r, c) for f in (torch.sin, torch.cos) for o in omega]
        torch.testing.assert_close(codes[cell], torch.stack(expected).float())


def test_loss_ignores_visible_pixels_of_the_target_and_counts_hidden_ones():
    mae = MAE(model(), norm_pix=False).eval()
    images = batch()["images"]
    torch.manual_seed(3)
    prediction, mask = mae.reconstruct(images)
    target = mae.target(images)
    loss = mae.loss(prediction, target, mask)
    moved = target + 5 * (~mask).unsqueeze(-1)
    assert torch.equal(mae.loss(prediction, moved, mask), loss)
    by_hand = torch.stack([(prediction[b, n] - target[b, n]).square().mean() for b, n in mask.nonzero()]).mean()
    torch.testing.assert_close(loss, by_hand)
    assert not torch.equal(mae.loss(prediction, target + mask.unsqueeze(-1), mask), loss)


def test_hidden_pixels_never_reach_the_encoder():
    mae = MAE(model()).eval()
    images = batch()["images"]
    torch.manual_seed(5)
    visible, mask = random_mask(4, 15, 0.75)
    first, _ = mae.reconstruct(images, visible)
    other = unpatchify(patchify(images, (4, 4)) + 9 * mask.unsqueeze(-1) * torch.randn(4, 15, 48), (4, 4), (3, 5))
    second, _ = mae.reconstruct(other, visible)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_predictions_stand_at_their_own_places():
    """A decoder that passes its tokens on puts every visible patch back where it came from."""
    mae = MAE(model(), decoder_dim=64, decoder_heads=2)
    mae.decoder.blocks, mae.decoder.norm = torch.nn.Sequential(), torch.nn.Identity()
    mae.decoder.positions.zero_()
    tokens = torch.randn(2, 1 + 4, 64)
    visible = torch.tensor([[0, 3, 7, 14], [2, 5, 6, 8]])
    out = mae.decoder(tokens, visible, 1)
    expected = mae.decoder.pixels(mae.decoder.project(tokens[:, 1:]))
    torch.testing.assert_close(out.gather(1, visible.unsqueeze(-1).expand(-1, -1, 48)), expected)


def test_ratio_zero_keeps_everything_and_the_loss_is_zero():
    mae = MAE(model(), mask_ratio=0.0)
    out = mae(batch())
    assert not out["mask"].any()
    assert out["loss"] == 0
    assert torch.isfinite(out["output"]).all()


def test_norm_pix_targets_have_mean_zero_and_unit_variance():
    target = MAE(model()).target(batch()["images"])
    torch.testing.assert_close(target.mean(-1), torch.zeros(4, 15), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(4, 15), atol=1e-3, rtol=0)
    flat = MAE(model()).target(torch.ones(1, 3, 12, 20))
    assert (flat == 0).all()


def test_encoder_only_sees_the_visible_tokens():
    net = model()
    mae = MAE(net)
    seen = []
    handle = net.blocks[0].norm1.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    mae(batch())
    handle.remove()
    assert seen == [1 + num_visible(15, 0.75)]


def test_pretraining_lowers_the_loss_and_moves_the_encoder():
    net = NormalizedModel(model(), [0.5] * 3, [0.25] * 3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    mae = MAE(net)
    fixed = net.model.pos_embed.clone()
    optimizer = torch.optim.AdamW([p for p in mae.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(40):
        torch.manual_seed(step % 2)
        loss = mae(batch(8))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(net.model.pos_embed, fixed)
    assert mae.encoder() is net
    assert net.model.pos_embed.requires_grad
    moved = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert any("blocks.3.mlp" in k for k in moved)
    assert not any("head" in k for k in moved)


@pytest.mark.parametrize("options", [{"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}, {"in_chans": 1}])
def test_other_hosts(options):
    mae = MAE(model(**options))
    images = torch.rand(2, options.get("in_chans", 3), 12, 20)
    out = mae({"images": images})
    assert out["output"].shape == (2, 15, 16 * images.shape[1])
    out["loss"].backward()


def test_bad_options():
    with pytest.raises(ValueError, match="mask_ratio=1.0"):
        MAE(model(), mask_ratio=1.0)
    with pytest.raises(ValueError, match="decoder_dim=30"):
        MAE(model(), decoder_dim=30)
    with pytest.raises(TypeError, match="vision transformer"):
        MAE(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("width, heads", [(88, 4), (104, 4), (200, 5), (40, 4), (24, 3)])
def test_every_width_gets_a_decoder(width, heads):
    mae = MAE(model(embed_dim=width, num_heads=heads))
    assert mae.decoder.width % mae.decoder.blocks[0].attn.num_heads == 0
    assert mae.decoder.width // mae.decoder.blocks[0].attn.num_heads >= 32
    mae(batch())["loss"].backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_decoder_has_the_models_precision(dtype):
    mae = MAE(NormalizedModel(model(), [0.5] * 3, [0.25] * 3).to(dtype))
    assert {p.dtype for p in mae.parameters()} == {dtype}
    out = mae({"images": batch()["images"].to(dtype)})
    assert out["output"].dtype == dtype and out["loss"].isfinite()
    out["loss"].backward()
    assert all(p.grad.isfinite().all() for p in mae.decoder.parameters())


@pytest.mark.parametrize("size", [(8, 8), (20, 24)])
def test_images_of_another_size(size):
    mae = MAE(model(dynamic_img_size=True)).eval()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    n = size[0] // 4 * (size[1] // 4)
    out = mae({"images": images})
    assert out["output"].shape == (2, n, 48) and out["mask"].sum(1).tolist() == [n - num_visible(n, 0.75)] * 2
    out["loss"].backward()
    # positions of the other grid, not those of the first cells of the usual one
    blank = mae.decoder
    blank.blocks, blank.norm, blank.pixels = (torch.nn.Identity() for _ in range(3))
    visible = torch.arange(n).expand(1, -1)
    x = torch.zeros(1, 1 + n, 64)
    found = blank(x, visible, 1, (size[0] // 4, size[1] // 4)) - blank.project(x[:, 1:])
    torch.testing.assert_close(found[0], sincos_2d((size[0] // 4, size[1] // 4), blank.width))


def test_what_cannot_be_masked_says_so():
    from vitkit.compress.merge.tome import tome

    merging, _ = tome(model(), r=1)
    with pytest.raises(ValueError, match="pretrain first, merge afterwards"):
        MAE(merging)(batch())
    with pytest.raises(ValueError, match="patch_drop_rate"):
        MAE(model(patch_drop_rate=0.3)).train()(batch())
