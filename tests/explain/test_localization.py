from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.explain.localization import boxes_to_masks, energy_pointing_game, iou_matched_area, pointing_game

BOXES = torch.tensor([[2, 1, 6, 4], [0, 0, 3, 8], [7, 5, 8, 8]])


def test_boxes_become_masks():
    masks = boxes_to_masks(BOXES, (8, 8))
    assert masks.dtype == torch.bool and masks.flatten(1).sum(1).tolist() == [12, 24, 3]
    assert bool(masks[0, 1:4, 2:6].all())


def test_a_map_that_is_the_mask_is_perfect():
    masks = boxes_to_masks(BOXES, (8, 8))
    for score in (pointing_game, energy_pointing_game, iou_matched_area):
        assert torch.equal(score(masks.float(), masks), torch.ones(3)), score
        assert torch.equal(score(1 - masks.float(), masks), torch.zeros(3)), score


def test_energy_is_the_share_inside():
    masks = boxes_to_masks(BOXES, (8, 8))
    patch_map = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    for b in range(3):
        scaled = (patch_map[b] - patch_map[b].min()) / (patch_map[b].max() - patch_map[b].min())
        expected = scaled[masks[b]].sum() / scaled.sum()
        torch.testing.assert_close(energy_pointing_game(patch_map, masks)[b], expected)
    # neither unit nor offset of a map matters
    moved = energy_pointing_game(5 * patch_map + 3, masks)
    torch.testing.assert_close(moved, energy_pointing_game(patch_map, masks), atol=1e-5, rtol=1e-4)
    constant = energy_pointing_game(torch.ones(3, 8, 8), masks)
    torch.testing.assert_close(constant, masks.float().mean((1, 2)))


def test_the_hit_may_miss_by_the_tolerance():
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 0, 0] = True
    patch_map = torch.zeros(1, 8, 8)
    patch_map[0, 3, 4] = 1.0
    assert [pointing_game(patch_map, masks, t).item() for t in (0, 4, 5)] == [0.0, 0.0, 1.0]


def test_iou_at_matched_area():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 0, :] = True
    patch_map = torch.zeros(1, 4, 4)
    patch_map[0, 0, :2] = 2.0
    patch_map[0, 3, :2] = 1.0
    assert iou_matched_area(patch_map, masks).item() == pytest.approx(2 / 6)


def test_coarse_maps_are_enlarged():
    masks = boxes_to_masks(torch.tensor([[0, 0, 4, 4]]), (8, 8))
    patch_map = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert pointing_game(patch_map, masks).item() == 1.0
    assert 0.5 < energy_pointing_game(patch_map, masks).item() < 1.0


def test_bad_masks():
    with pytest.raises(BadInput, match="empty"):
        pointing_game(torch.rand(1, 2, 2), torch.zeros(1, 8, 8, dtype=torch.bool))
    with pytest.raises(BadInput, match="must be"):
        energy_pointing_game(torch.rand(2, 2, 2), torch.ones(1, 8, 8, dtype=torch.bool))
