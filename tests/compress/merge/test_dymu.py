from __future__ import annotations

import copy
import json

import pytest
import torch

from vitkit.anatomy import host
from vitkit.compress.merge.dymu import MergeAbove, count_tokens, dymu, fit_thresholds, restore
from vitkit.compress.merge.matching import forward_tokens
from vitkit.compress.merge.tome import tome
from vitkit.errors import BadInput
from vitkit.models.normalized import NormalizedModel
from vitkit.models.vit import ViT

PREFIXES = {
    "mean pool": {"class_token": False, "global_pool": "avg"},
    "class": {},
    "registers": {"reg_tokens": 4},
    "attention pool": {"class_token": False, "global_pool": "map"},
}


def make(seed: int = 0, **options) -> ViT:
    torch.manual_seed(seed)
    settings = {
        "img_size": (10, 14),
        "patch_size": 2,
        "in_chans": 3,
        "num_classes": 4,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
        "weight_init": "jax",
    }
    vit = ViT(**(settings | options)).eval()
    torch.nn.init.normal_(vit.head.weight)  # the initial head is zero, and zeros are always equal
    return vit


def pixels(batch: int = 64, seed: int = 1) -> torch.Tensor:
    """Images of different complexity: noise whose contrast and flat part differ from image to image."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, 10, 14, generator=generator)
    for i, image in enumerate(images):
        image[:, :, : 2 * (i % 7)] = 0.5
    return images


def with_thresholds(vit: ViT, *tau: float, **options) -> ViT:
    new = copy.deepcopy(vit)
    for block, t in zip(new.blocks, tau):
        block.reduce = MergeAbove(t, **options)
    return new


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("tau", [1.0, float("inf")])
@torch.no_grad()
def test_a_threshold_of_one_is_the_plain_model(prefix, tau):
    vit = make(**PREFIXES[prefix])
    images = pixels(4)
    images[0] = 0.5  # with equal patches the unclamped cosine would pass 1
    if vit.pos_embed is not None:
        torch.nn.init.zeros_(vit.pos_embed)
    torch.testing.assert_close(with_thresholds(vit, tau, tau, tau)(images), vit(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", PREFIXES)
@torch.no_grad()
def test_a_threshold_below_all_scores_halves_in_every_block(prefix):
    merged = with_thresholds(make(**PREFIXES[prefix]), -2.0, -2.0, -2.0)
    x, layout = merged.embed(pixels(3))
    for block, count in zip(merged.blocks, (18, 9, 5)):
        x, layout = block(x, layout)
        assert x.shape[1] - layout.num_prefix == count
        assert layout.valid is None


@pytest.mark.parametrize("prefix", PREFIXES)
@torch.no_grad()
def test_one_image_alone_and_in_a_padded_batch_agree(prefix):
    # float64: no other image's score can come to lie on a threshold by rounding
    vit = make(**PREFIXES[prefix]).double()
    images = pixels(14).double()
    merged, _ = dymu(vit, pixels(seed=2).double(), target_tokens=14)
    together = merged(images)
    tokens, layout = forward_tokens(merged, images)
    counts = layout.valid.sum(1)
    assert counts.min() < counts.max() == layout.valid.shape[1], "the test needs images of different length"
    for i in range(len(images)):
        torch.testing.assert_close(merged(images[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)
        alone, own = forward_tokens(merged, images[i : i + 1])
        assert own.valid is None
        assert alone.shape[1] - own.num_prefix == counts[i]
        rows = own.num_prefix + int(counts[i])
        torch.testing.assert_close(alone[0], tokens[i, :rows], rtol=1e-4, atol=1e-4)
        assert torch.equal(own.source[0], layout.source[i])
        assert torch.equal(own.sizes[0], layout.sizes[i, : int(counts[i])])


@torch.no_grad()
def test_calibration_images_come_out_alike_alone_and_together():
    """Each threshold is the score of an edge of these very images: the hardest case for rounding."""
    images = pixels(24)
    merged, _ = dymu(make(), images, target_tokens=14)
    alone = torch.cat([merged(images[i : i + 1]) for i in range(24)])
    torch.testing.assert_close(alone, merged(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(count_tokens(merged, images, 24), count_tokens(merged, images, 1))


@pytest.mark.parametrize("prefix", PREFIXES)
@torch.no_grad()
def test_sizes_and_sources_account_for_every_patch(prefix):
    merged, _ = dymu(make(**PREFIXES[prefix]), pixels(seed=2), target_tokens=14)
    x, layout = merged.embed(pixels(9))
    for block in merged.blocks:
        x, layout = block(x, layout)
        assert (layout.sizes.sum(1) == 35).all()
        assert (layout.source_map(9, x.shape[1] - layout.num_prefix).sum(1) == 1).all()
        if layout.valid is not None:
            assert (layout.sizes[~layout.valid] == 0).all()
            assert (layout.valid.long().diff(dim=1) <= 0).all(), "padding stands at the tail"


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("schedule", ["constant", "linear", "decreasing"])
def test_a_calibration_batch_merges_as_planned(prefix, schedule):
    images = torch.rand(64, 3, 10, 14, generator=torch.Generator().manual_seed(1))
    found = fit_thresholds(make(**PREFIXES[prefix]), images, target_tokens=20, schedule=schedule, batch_size=64)
    assert sum(found.merges) == 15
    assert len(found.batch_tau) == 1
    assert all(0 < tau <= 1 for tau in found.tau), "the floor at 0 is not hit in this test"
    # noise has no equal tokens; of 960 edges two may tie on the grid of cosines
    assert found.batch_merges[0] == pytest.approx(found.merges, abs=2.01 / 64)
    merged = found.apply(make(**PREFIXES[prefix]))
    assert count_tokens(merged, images).float().mean() == pytest.approx(20, abs=0.2)


def test_the_threshold_is_the_running_mean_over_batches():
    vit = make()
    batches = [pixels(16, seed=s) for s in range(4)]
    found = fit_thresholds(vit, batches, target_tokens=20)
    assert len(found.batch_tau) == 4
    for i in range(3):
        assert found.tau[i] == pytest.approx(sum(tau[i] for tau in found.batch_tau) / 4)
    # the first block's τ is that of each batch alone; later blocks see what each batch left
    singles = [fit_thresholds(vit, batch, target_tokens=20) for batch in batches]
    for single, taus in zip(singles, found.batch_tau):
        assert single.tau == pytest.approx(taus)


def test_the_threshold_is_the_first_score_not_kept():
    """By a naive pool of all edges of the first block."""
    vit = make()
    images = pixels(8)
    found = fit_thresholds(vit, images, target_tokens=17)
    x, _ = vit.embed(images)
    keys = vit.blocks[0].attn.heads(vit.blocks[0].norm1(x))[1][:, :, 1:].mean(1)
    unit = (keys / keys.norm(dim=-1, keepdim=True)).detach()
    scores = sorted((float(s) for image in unit for s in (image[1::2] @ image[0::2].T).max(1).values), reverse=True)
    assert found.tau[0] == pytest.approx(scores[8 * found.merges[0]], abs=2e-6)


def test_the_floor_at_zero():
    vit = make(depth=1)
    with torch.no_grad():
        # keys that all point apart: the last half of the edges has negative cosines
        found = fit_thresholds(vit, pixels(8), target_tokens=18)
    assert found.merges == (17,)
    assert found.tau == (0.0,)


@torch.no_grad()
def test_more_equal_tokens_than_planned_still_merge():
    vit = make()
    torch.nn.init.zeros_(vit.pos_embed)
    flat = torch.full((8, 3, 10, 14), 0.5)
    found = fit_thresholds(vit, flat, target_tokens=30)
    assert all(0.9999 < tau < 1 for tau in found.tau)
    assert (count_tokens(found.apply(vit), flat) == 5).all(), "35 equal tokens halve in each of three blocks"
    torch.testing.assert_close(found.apply(vit)(flat), vit(flat), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_flat_images_keep_fewer_tokens():
    vit = make()
    torch.nn.init.zeros_(vit.pos_embed)
    merged, _ = dymu(vit, pixels(seed=2), target_tokens=16)
    noise = torch.rand(8, 3, 10, 14, generator=torch.Generator().manual_seed(3))
    half = noise.clone()
    half[..., 7:] = 0.5
    counts = [count_tokens(merged, images).float().mean() for images in (noise, half, torch.full_like(noise, 0.5))]
    assert counts[0] > counts[1] > counts[2]


@torch.no_grad()
def test_details_report_what_images_really_keep():
    images = pixels(96)
    merged, change = dymu(make(), images, ratio=0.5, batch_size=32)
    counts = count_tokens(merged, images).float()
    assert change.details["mean_tokens"] == pytest.approx(counts.mean().item())
    assert change.details["target_tokens"] == 18
    assert abs(counts.mean() - 18) < 3, "the running mean stays near the plan"
    assert len(change.details["thresholds"]) == 3
    assert json.loads(json.dumps(change.details)) == change.details


@torch.no_grad()
def test_thresholds_are_saved_with_the_weights():
    merged, _ = dymu(make(), pixels(), ratio=0.5, cap=1.5)
    state = merged.state_dict()
    assert {f"blocks.{i}.reduce.threshold" for i in range(3)} <= set(state)
    again = make(seed=9)
    for step in json.loads(json.dumps(merged.applied)):
        assert step["name"] == "dymu"
        again = restore(again, step["options"])
    again.load_state_dict(state)
    assert torch.equal(again(pixels(5)), merged(pixels(5)))
    assert torch.equal(copy.deepcopy(merged)(pixels(5)), merged(pixels(5)))


@torch.no_grad()
def test_the_cap_limits_every_image():
    vit, images = make(), pixels(9)
    torch.nn.init.zeros_(vit.pos_embed)
    merged = with_thresholds(vit, -2.0, -2.0, -2.0, max_merges=4)
    assert (count_tokens(merged, images) == 35 - 12).all()
    plan = fit_thresholds(vit, pixels(), ratio=0.4).merges
    capped = dymu(vit, pixels(), ratio=0.4, cap=1.0)[0]
    assert (count_tokens(capped, images) >= 35 - sum(plan)).all()
    # at equal numbers, DToMe merges what ToMe merges
    torch.testing.assert_close(merged(images), tome(vit, r=4)[0](images), rtol=1e-4, atol=1e-5)


def test_the_input_model_stays_as_it_was():
    vit = NormalizedModel(make(), [0.5] * 3, [0.25] * 3).train()
    before = copy.deepcopy(vit.state_dict())
    merged, change = dymu(vit, pixels(), target_tokens=20)
    assert all(torch.equal(before[k], v) for k, v in vit.state_dict().items())
    assert all(block.reduce is None for block in vit.model.blocks)
    assert vit.training
    assert merged.training
    assert change.params_before == change.params_after
    assert host(merged).applied[-1]["name"] == "dymu"
    assert not hasattr(vit.model, "applied") or not vit.model.applied


def test_loaders_of_any_usual_shape():
    vit, images = make(), pixels()
    expected = fit_thresholds(vit, [images[:32], images[32:]], target_tokens=20).tau
    as_tuples = [(images[:32], torch.zeros(32)), (images[32:], torch.zeros(32))]
    as_dicts = [{"images": batch} for batch, _ in as_tuples]
    assert fit_thresholds(vit, as_tuples, target_tokens=20).tau == expected
    assert fit_thresholds(vit, as_dicts, target_tokens=20).tau == expected
    assert fit_thresholds(vit, images, target_tokens=20, batch_size=32).tau == expected
    generator = (batch for batch, _ in as_tuples)
    _, change = dymu(vit, generator, target_tokens=20)
    assert tuple(change.details["thresholds"]) == expected
    assert change.details["calibration_images"] == 64
    seen = []
    fit_thresholds(vit, as_tuples, target_tokens=20, progress=lambda *step: seen.append(step))
    assert seen == [("thresholds", 1, 2), ("thresholds", 2, 2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_precisions(dtype):
    merged, change = dymu(make(), pixels(), target_tokens=16)
    out = merged.to(dtype)(pixels(7).to(dtype))
    kept = [float(block.reduce.threshold) for block in merged.blocks]
    assert kept == pytest.approx(change.details["thresholds"], abs=1e-7), "thresholds must not be rounded to bf16"
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_trains_on_padded_batches():
    merged, _ = dymu(make(), pixels(), target_tokens=16)
    merged.train()
    merged(pixels(7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in merged.parameters())


@torch.no_grad()
def test_compiles_with_graph_breaks():
    merged, _ = dymu(make(depth=1), pixels(), target_tokens=20)
    compiled = torch.compile(merged, backend="eager")
    torch.testing.assert_close(compiled(pixels(5)), merged(pixels(5)), rtol=1e-5, atol=1e-5)


def test_refusals():
    vit = make()
    with pytest.raises(BadInput, match="as images"):
        dymu(vit, None)
    with pytest.raises(BadInput, match="got none"):
        dymu(vit, [])
    with pytest.raises(BadInput, match="got none"):
        dymu(vit, torch.zeros(0, 3, 10, 14))
    with pytest.raises(BadInput, match="5 to 35"):
        dymu(vit, pixels(), target_tokens=3)
    with pytest.raises(BadInput, match="give one"):
        dymu(vit, pixels(), target_tokens=20, ratio=0.5)
    with pytest.raises(BadInput, match=r"cap=0\.5"):
        dymu(vit, pixels(), cap=0.5)
    with pytest.raises(BadInput, match="already reduces"):
        dymu(tome(vit, r=2)[0], pixels())
    with pytest.raises(BadInput, match="calibration batch"):
        dymu(vit, ["no image"])
    few = dymu(vit, pixels(8), target_tokens=20)[1]
    assert "only 8 images" in few.lost
