from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit.anatomy import host
from vitkit.compress.merge.dymu import MergeAbove, count_tokens, dymu
from vitkit.compress.merge.tome import MergeTokens, tome
from vitkit.deploy.merging import DenseMerge, DenseMergeAbove, dense_merges, ranks
from vitkit.models.build import build
from vitkit.testing.worlds import tiny_vit


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("proportional", [True, False])
def test_dense_merging_answers_like_token_merging(prefix, proportional):
    torch.manual_seed(0)
    options = {"class_token": prefix > 0, "global_pool": "token" if prefix else "avg", "reg_tokens": max(0, prefix - 1)}
    vit = tiny_vit(8, 2, 1, 10, depth=3, **options).double().eval()
    torch.nn.init.normal_(vit.head.weight)
    merged, _ = tome(vit, r=3, proportional=proportional)
    dense = dense_merges(merged, np.zeros((1, 1, 8, 8)))
    assert [type(b.reduce) for b in host(dense).blocks] == [DenseMerge] * 3
    assert [type(b.reduce) for b in host(merged).blocks] == [MergeTokens] * 3
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(dense(x), merged(x))


@pytest.mark.parametrize("kind", ["mixed", "axial"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_rotary_positions_follow_dense_merging(kind, dynamic):
    torch.manual_seed(0)
    vit = tiny_vit(16, 2, 1, 10, depth=3, position=("rope2d", {"kind": kind}), reg_tokens=1).double().eval()
    torch.nn.init.normal_(vit.head.weight)
    images = uneven(12)
    merged = dymu(vit, images, target_tokens=30)[0] if dynamic else tome(vit, r=9)[0]
    dense = dense_merges(merged, images.numpy())
    with torch.no_grad():
        torch.testing.assert_close(dense(images), merged(images))


def test_hosts_that_turn_by_tables_export_merged():
    eva = build("eva02_tiny_patch14_224", img_size=56, num_classes=5).eval()
    torch.nn.init.normal_(eva.head.weight)
    merged, _ = tome(eva, r=3)
    images = torch.rand(2, 3, 56, 56)
    dense = dense_merges(merged, images.numpy())
    graph = torch.export.export(dense, (images,)).module()
    with torch.no_grad():
        torch.testing.assert_close(graph(images), merged(images), rtol=1e-4, atol=1e-4)


def test_a_model_that_merges_nothing_is_returned_as_it_is(model):
    images = np.zeros((1, 1, 8, 8))
    assert dense_merges(model, images) is model
    net = torch.nn.Conv2d(1, 1, 1)
    assert dense_merges(net, images) is net


def test_no_merges_left_to_make():
    x, layout = tiny_vit(8, 2, 1, 10).embed(torch.rand(1, 1, 8, 8))
    assert DenseMerge(0, True)(x, torch.rand(1, 2, x.shape[1], 4), layout)[0] is x


def uneven(count: int, side: int = 16) -> torch.Tensor:
    """Images of which the first are nearly flat and the last are noise."""
    noise = torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise * torch.linspace(0.02, 1, count, dtype=torch.float64)[:, None, None, None]


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"proportional": False}, {"cap": 1.2}], ids=["plain", "unweighted", "capped"])
def test_dense_dynamic_merging_answers_like_dymu(prefix, options):
    torch.manual_seed(prefix)
    slots = {"class_token": prefix > 0, "global_pool": "token" if prefix else "avg", "reg_tokens": max(0, prefix - 1)}
    vit = tiny_vit(16, 2, 1, 10, depth=3, **slots).double().eval()
    torch.nn.init.normal_(vit.head.weight)
    images = uneven(24)
    merged, _ = dymu(vit, images, target_tokens=30, **options)
    dense = dense_merges(merged, images.numpy())
    assert [type(b.reduce) for b in host(dense).blocks] == [DenseMergeAbove] * 3
    assert [type(b.reduce) for b in host(merged).blocks] == [MergeAbove] * 3
    counts = count_tokens(merged, images)
    assert counts.min() < counts.max() == host(dense).blocks[-1].reduce.room
    with torch.no_grad():
        torch.testing.assert_close(dense(images), merged(images))
        # an image alone has the same padding as in a batch
        torch.testing.assert_close(dense(images[:1]), merged(images[:1]))


def test_an_image_that_needs_more_room_merges_its_best_pairs():
    torch.manual_seed(0)
    vit = tiny_vit(16, 2, 1, 10, depth=2).double().eval()
    images = uneven(24)
    merged, _ = dymu(vit, images, target_tokens=30)
    order = count_tokens(merged, images).argsort()
    busiest = images[order[-1:]]
    dense = dense_merges(merged, images[order[:8]].numpy())
    rooms = [b.reduce.room for b in host(dense).blocks]
    assert count_tokens(merged, busiest) > rooms[-1]
    x, layout = host(dense).run(*host(dense).embed(busiest))
    assert x.shape[1] - layout.num_prefix == rooms[-1] == int(layout.valid.sum())
    # nothing is dropped: every patch stands in some row
    assert float(layout.sizes.sum()) == pytest.approx(64)
    fixed, _ = tome(vit, r=1)
    for block, room, before in zip(host(fixed).blocks, rooms, [64, rooms[0]]):
        block.reduce.num_merges = before - room
    # as every image keeps the same number, fixed merging does the same where the threshold adds nothing
    with torch.no_grad():
        torch.testing.assert_close(dense(busiest), fixed(busiest))


def test_ranks_are_places_in_a_stable_sort():
    score = torch.tensor([[0.5, 0.9, 0.5, -torch.inf, 1.0]])
    assert ranks(score).tolist() == [[2, 1, 3, 4, 0]]


def test_values_that_are_no_numbers_stay_so_and_break_nothing():
    vit = tiny_vit(8, 2, 1, 10, depth=2).eval()
    dense = dense_merges(tome(vit, r=3)[0], np.zeros((1, 1, 8, 8)))
    images = torch.rand(2, 1, 8, 8)
    images[0] = torch.nan
    with torch.no_grad():
        logits = dense(images)
    assert logits[0].isnan().all() and logits[1].isfinite().all()
