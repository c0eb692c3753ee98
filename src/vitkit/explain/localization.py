"""Does a map point at the object? Scores against a known box or mask."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkit.errors import BadInput
from vitkit.explain.base import normalize, to_pixels

# B images · H×W pixels


def boxes_to_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (B, 4) as ``x0, y0, x1, y1`` in pixels, ends excluded → masks (B, H, W) bool.

    >>> boxes_to_masks(torch.tensor([[1, 0, 3, 1]]), (2, 3)).int()
    tensor([[[0, 1, 1],
             [0, 0, 0]]], dtype=torch.int32)
    """
    rows = torch.arange(size[0], device=boxes.device)[None, :, None]
    cols = torch.arange(size[1], device=boxes.device)[None, None, :]
    x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
    return (cols >= x0) & (cols < x1) & (rows >= y0) & (rows < y1)


def pointing_game(patch_map: Tensor, masks: Tensor, tolerance: int = 0) -> Tensor:
    """1 where the map's highest pixel lies in the mask, else 0.

    Args:
        patch_map: (B, gh, gw), enlarged bilinearly.
        masks: (B, H, W) bool.
        tolerance: pixels by which the hit may miss the mask (Euclidean); the literature uses 0 or 15.

    Returns: (B,) float. Among equal pixels the first in raster order counts.
    Raises: BadInput if a mask is empty or does not fit.
    """
    pixels, masks = _prepare(patch_map, masks)
    height, width = masks.shape[-2:]
    best = pixels.flatten(1).argmax(1)
    row, col = best // width, best % width
    rows = torch.arange(height, device=masks.device)[None, :, None] - row[:, None, None]
    cols = torch.arange(width, device=masks.device)[None, None, :] - col[:, None, None]
    near = rows.square() + cols.square() <= tolerance**2
    return (near & masks).flatten(1).any(1).float()


def energy_pointing_game(patch_map: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's mass inside the mask: ``Σ_{mask} m / Σ m`` of the map scaled to [0, 1].

    Args:
        patch_map: (B, gh, gw), enlarged bilinearly.
        masks: (B, H, W) bool.

    Returns: (B,) in [0, 1]; a constant map gets the mask's share of the image.
    Raises: BadInput if a mask is empty or does not fit.

    Paper: Wang et al., Score-CAM, arXiv:1910.01279, §4.3.
    """
    pixels, masks = _prepare(patch_map, masks)
    mass = normalize(normalize(pixels, "minmax"), "sum")
    return (mass * masks).flatten(1).sum(1)


def iou_matched_area(patch_map: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of the mask with as many of the map's highest pixels as the mask has.

    Args:
        patch_map: (B, gh, gw), enlarged bilinearly.
        masks: (B, H, W) bool.

    Returns: (B,) in [0, 1]; equal scores count in raster order.
    Raises: BadInput if a mask is empty or does not fit.
    """
    pixels, masks = _prepare(patch_map, masks)
    flat, inside = pixels.flatten(1), masks.flatten(1)
    order = flat.sort(dim=1, descending=True, stable=True).indices
    area = inside.sum(1, keepdim=True)
    hits = (inside.gather(1, order) & (torch.arange(flat.shape[1], device=flat.device) < area)).sum(1)
    area = area.squeeze(1)
    return hits / (2 * area - hits)


def _prepare(patch_map: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    if masks.ndim != 3 or patch_map.ndim != 3 or len(masks) != len(patch_map):
        raise BadInput(
            f"maps {tuple(patch_map.shape)} and masks {tuple(masks.shape)} must be (B, gh, gw) and (B, H, W)."
        )
    masks = masks.to(patch_map.device).bool()
    if not bool(masks.flatten(1).any(1).all()):
        raise BadInput("a mask is empty: there is nothing to point at. Leave such images out.")
    return to_pixels(patch_map, (masks.shape[-2], masks.shape[-1])), masks
