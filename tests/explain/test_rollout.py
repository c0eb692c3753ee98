from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vitkit.anatomy import Trace
from vitkit.compress.merge.tome import tome
from vitkit.errors import BadInput
from vitkit.explain.attention_flow import compose, discard_weakest, fuse_heads, trace_attention, transition
from vitkit.explain.attention_map import attention_map
from vitkit.explain.base import normalize
from vitkit.explain.rollout import rollout
from vitkit.models.build import build
from vitkit.models.normalized import NormalizedModel
from vitkit.models.rehost import rehost
from vitkit.testing.checks import check_probe

IMAGES = torch.rand(3, 1, 20, 28, generator=torch.Generator().manual_seed(5))


def model(**options):
    torch.manual_seed(2)
    defaults = {"img_size": (20, 28), "patch_size": 4, "in_chans": 1, "num_classes": 4, "depth": 3}
    net = build("vit_femto", **{**defaults, **options})
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return NormalizedModel(net.eval(), [0.4], [0.3])


def weights_of(net, images):
    with torch.no_grad(), Trace(net, "blocks.*.attn.weights") as trace:
        net(images)
    return trace.stack("attn.weights"), trace.layouts["blocks.0.attn.weights"]


def reference(weights, row, fuse=lambda a: a.mean(0)):
    """The definition for one image, block by block, in float64."""
    total = torch.eye(weights[0].shape[-1], dtype=torch.float64)
    for attention in weights:
        mixed = fuse(attention.double()) + torch.eye(len(total), dtype=torch.float64)
        total = (mixed / mixed.sum(1, keepdim=True)) @ total
    return total[row].mean(0) if isinstance(row, slice) else total[row]


@pytest.mark.parametrize("reg_tokens", [0, 2])
def test_matches_the_definition(reg_tokens):
    net = model(reg_tokens=reg_tokens)
    weights, _ = weights_of(net, IMAGES)
    found = rollout(net, IMAGES)
    assert found.map.shape == (3, 5, 7)
    for b in range(3):
        expected = reference([w[b] for w in weights], 0)[1 + reg_tokens :]
        torch.testing.assert_close(found.map[b].flatten().double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.target, net(IMAGES).argmax(-1))


@pytest.mark.parametrize("options", [{"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}])
def test_a_model_that_reads_no_class_token_gets_the_mean_over_patch_rows(options):
    net = model(**options)
    weights, layout = weights_of(net, IMAGES)
    first = layout.num_prefix
    found = rollout(net, IMAGES).map
    expected = reference([w[1] for w in weights], slice(first, None))[first:]
    torch.testing.assert_close(found[1].flatten().double(), expected, atol=1e-6, rtol=1e-5)


def test_every_transition_and_the_whole_flow_have_rows_that_sum_to_one():
    seen = trace_attention(model(reg_tokens=1), IMAGES)
    for how in ("mean", "max", "min"):
        steps = [transition(fuse_heads(a, how)) for a in seen.weights]
        flow = compose(steps, seen.layouts)
        for matrix in (*steps, flow):
            torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:-1]), atol=1e-5, rtol=0)


def test_max_and_min_are_taken_over_heads():
    net = model()
    weights, _ = weights_of(net, IMAGES)
    for how, fuse in (("max", lambda a: a.amax(0)), ("min", lambda a: a.amin(0))):
        expected = reference([w[2] for w in weights], 0, fuse)[1:]
        found = rollout(net, IMAGES, head_fusion=how).map[2].flatten().double()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_discarding_keeps_rows_normalised_and_the_prefix_columns():
    fused = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1))
    fused[:, :, 0] = 1e-6
    cut = discard_weakest(fused, 0.5, num_prefix=1)
    assert torch.equal(cut[:, :, 0], fused[:, :, 0])
    assert ((cut == 0).sum((1, 2)) == 18 - 6).all()  # 18 of 36 were weakest, 6 of them go to the prefix token
    for before, after in zip(fused[:, :, 1:], cut[:, :, 1:]):
        assert after[after > 0].min() > before[after == 0].max()
    torch.testing.assert_close(transition(cut, add_residual=False).sum(-1), torch.ones(2, 6))
    net = model()
    assert torch.equal(rollout(net, IMAGES, discard_ratio=0.0).map, rollout(net, IMAGES).map)
    assert not torch.allclose(rollout(net, IMAGES, discard_ratio=0.9).map, rollout(net, IMAGES).map)
    with pytest.raises(BadInput, match="discard_ratio"):
        rollout(net, IMAGES, discard_ratio=1.0)


def test_a_row_that_lost_everything_passes_its_own_token_on():
    fused = torch.zeros(1, 3, 3)
    assert torch.equal(transition(fused, add_residual=False), torch.eye(3)[None])


def test_merged_tokens_flow_back_to_their_patches():
    net, _ = tome(model(depth=4), r=6)
    seen = trace_attention(net, IMAGES)
    assert seen.weights[-1].shape[-1] < seen.weights[0].shape[-1]
    steps = [transition(fuse_heads(a)) for a in seen.weights]
    # brute force: every transition between original patches, rows shared by and columns divided among the members
    total = torch.eye(36, dtype=torch.float64).expand(3, -1, -1)
    for step, layout in zip(steps, seen.layouts):
        members = layout.source_map(3, step.shape[-1] - 1).double()
        members = torch.stack([torch.block_diag(torch.ones(1, 1), m) for m in members.float()]).double()
        spread = members / members.sum(-1, keepdim=True)
        total = members.transpose(1, 2) @ step.double() @ spread @ total
    found = rollout(net, IMAGES).map
    torch.testing.assert_close(found.flatten(1).double(), total[:, 0, 1:], atol=1e-6, rtol=1e-5)
    flow = compose(steps, seen.layouts)
    torch.testing.assert_close(flow.sum(-1), torch.ones(flow.shape[:-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}])
def test_merging_nothing_changes_nothing(options):
    net = model(**options)
    still, _ = tome(net, r=0)
    torch.testing.assert_close(rollout(still, IMAGES).map, rollout(net, IMAGES).map)


class _KeepFirst(nn.Module):
    """Drops all patch tokens but the first ``num_kept``."""

    def __init__(self, num_kept):
        super().__init__()
        self.num_kept = num_kept

    def forward(self, x, keys, layout):
        index = torch.arange(self.num_kept).expand(len(x), -1)
        p = layout.num_prefix
        return x[:, : p + self.num_kept], layout.take(index)


def test_a_dropped_patch_counts_only_through_the_blocks_it_lived_in():
    net = model(depth=2)
    net.model.blocks[0].reduce = _KeepFirst(10)
    seen = trace_attention(net, IMAGES)
    first, second = (transition(fuse_heads(a)) for a in seen.weights)
    assert second.shape[-1] == 11
    expected = second @ first[:, :11]
    torch.testing.assert_close(rollout(net, IMAGES).map.flatten(1), expected[:, 0, 1:])
    # two drops in a row: the layout of the second is relative to the original patches
    net.model.blocks[1].reduce = _KeepFirst(4)
    torch.testing.assert_close(rollout(net, IMAGES).map.flatten(1), expected[:, 0, 1:])


def test_raw_attention_is_the_class_row_of_the_last_block():
    net = model(reg_tokens=2)
    weights, _ = weights_of(net, IMAGES)
    found = attention_map(net, IMAGES)
    torch.testing.assert_close(found.map.flatten(1), weights[-1].mean(1)[:, 0, 3:])
    torch.testing.assert_close(found.per_head.flatten(2), weights[-1][:, :, 0, 3:])
    torch.testing.assert_close(attention_map(net, IMAGES, layer=0).map.flatten(1), weights[0].mean(1)[:, 0, 3:])
    with pytest.raises(BadInput, match="blocks 0…2"):
        attention_map(net, IMAGES, layer=3)
    merged, _ = tome(net, r=6)
    spread = attention_map(merged, IMAGES)
    weights, _ = weights_of(merged, IMAGES)
    torch.testing.assert_close(spread.map.sum((1, 2)), weights[-1].mean(1)[:, 0, 3:].sum(-1))
    torch.testing.assert_close(spread.per_head.mean(1), spread.map)


def test_chunks_change_nothing():
    net = model()
    whole, pieces = rollout(net, IMAGES, head_fusion="gmar_l1"), rollout(net, IMAGES, head_fusion="gmar_l1", chunk=2)
    torch.testing.assert_close(whole.map, pieces.map)
    torch.testing.assert_close(whole.meta["head_weights"], pieces.meta["head_weights"])
    torch.testing.assert_close(attention_map(net, IMAGES).per_head, attention_map(net, IMAGES, chunk=1).per_head)


def test_a_rehosted_timm_model_and_other_image_sizes():
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3, dynamic_img_size=True)
    host = rehost(net)
    assert rollout(host, torch.rand(1, 3, 64, 64)).map.shape == (1, 4, 4)
    assert rollout(host, torch.rand(1, 3, 64, 96)).map.shape == (1, 4, 6)
    with pytest.raises(TypeError, match="rehost"):
        rollout(net, torch.rand(1, 3, 64, 64))


def test_what_cannot_be_followed_says_so():
    class Mixer(nn.Module):
        slot, preserves = "mixer", "none"

        def forward(self, x):
            return x

    net = model()
    net.model.blocks[1].attn = Mixer()
    with pytest.raises(LookupError, match=r"blocks\.1\.attn\.weights"):
        rollout(net, IMAGES)

    class Negative(nn.Module):
        def forward(self, scores, mask):
            return scores

    net = model()
    net.model.blocks[2].attn.normalizer = Negative()
    with pytest.raises(BadInput, match=r"blocks\.2 attends with negative"):
        rollout(net, IMAGES)
    with pytest.raises(LookupError, match="head fusion"):
        rollout(model(), IMAGES, head_fusion="meen")


@pytest.mark.parametrize("bad", [torch.tensor([0, 1]), torch.tensor([0, 1, 4]), torch.tensor([0.0, 1.0, 2.0])])
def test_wrong_targets_are_refused(bad):
    with pytest.raises(BadInput, match="target"):
        rollout(model(), IMAGES, bad)


def test_no_images_are_refused():
    with pytest.raises(BadInput, match="at least one image"):
        rollout(model(), IMAGES[:0])


@pytest.mark.parametrize("fusion", ["mean", "gmar_l2"])
def test_leaves_the_model_as_found(fusion):
    check_probe(rollout, head_fusion=fusion)
    check_probe(attention_map)


def test_bfloat16_and_inference_mode():
    net = model()
    expected = rollout(net, IMAGES, head_fusion="gmar_l1")
    with torch.inference_mode():
        for target in (None, expected.target + 0):
            inside = rollout(net, IMAGES + 0.0, target, head_fusion="gmar_l1")
            torch.testing.assert_close(inside.map, expected.map)
    half = rollout(net.to(torch.bfloat16), IMAGES, expected.target, head_fusion="gmar_l1")
    assert half.map.dtype == torch.float32
    torch.testing.assert_close(half.map, expected.map, atol=0.01, rtol=0.1)


def test_pixel_map_and_normalisation():
    found = rollout(model(), IMAGES)
    assert found.pixel_map((20, 28)).shape == (3, 20, 28) and found.pixel_map(8).shape == (3, 8, 8)
    flat = normalize(found.map).flatten(1)
    assert torch.equal(flat.amin(1), torch.zeros(3)) and torch.equal(flat.amax(1), torch.ones(3))
    torch.testing.assert_close(normalize(found.map, "sum").sum((1, 2)), torch.ones(3))
    constant = torch.full((2, 3, 3), 7.0)
    assert normalize(constant).abs().max() == 0
    torch.testing.assert_close(normalize(-constant, "sum"), torch.full((2, 3, 3), 1 / 9))
