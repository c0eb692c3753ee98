"""Token merging as an engine runs it best: a handful of dense operations in place of sorting, gathering, scattering.

PyTorch's form (:mod:`vitkit.compress.merge.matching`) adds rows by index, which engines convert badly or run one by
one. Here whole rows are copied and those that merge move by one small product with a matrix of zeros and ones; nothing
is noted that only an explanation would read (where each patch went). Coordinates follow, since rotary positions turn a
merged token by its mean place; exporters leave them out where nobody reads them.

A graph has one number of rows in each place. Where images keep as many tokens as they need (DyMU), it has room for the
most that any calibration image kept, and the rest is padding; an image that would keep still more merges its most
similar pairs until it fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn

from vitkit.anatomy.host import find_host
from vitkit.compress.merge.dymu import MergeAbove, above, edges
from vitkit.compress.merge.matching import without_size_bias
from vitkit.compress.merge.tome import MergeTokens
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout


class DenseMerge(nn.Module):
    """What :class:`vitkit.compress.merge.tome.MergeTokens` computes, for sequences without padding.

    Cosines that differ by less than 2⁻²⁰ may be ranked the other way round.

    Args:
        num_merges, proportional: as there.

    Shape: (B, P+N, D), keys (B, H, P+N, d), layout → (B, P+N−r, D), layout.
    Raises: BadInput for padded tokens.
    """

    def __init__(self, num_merges: int, proportional: bool) -> None:
        super().__init__()
        self.num_merges, self.proportional = num_merges, proportional

    def forward(self, x: Tensor, keys: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        if layout.valid is not None:
            raise BadInput("tokens of a padded batch that a fixed number of merges joins run in PyTorch only.")
        num_prefix = layout.num_prefix
        first = num_prefix % 2
        rows_b, num_patches = x[:, num_prefix + 1 - first :: 2], x.shape[1] - num_prefix
        num_b = rows_b.shape[1]
        num_a = num_patches - num_b
        num_merges = min(self.num_merges, num_patches // 2)
        if num_merges == 0:
            return x, layout
        # products and roots as they stand: exporters write `@` and F.normalize with copies of both factors
        metric = keys.mean(1)
        # as one long list of rows: of three axes, OpenVINO would turn the last two around and back
        flat = metric.flatten(0, 1)
        unit = (flat * (flat * flat).sum(-1, keepdim=True).clamp(min=1e-24).rsqrt()).view_as(metric)

        def every_second(start: int) -> Tensor:
            return _rows(unit, torch.arange(start, x.shape[1], 2, device=x.device).expand(x.shape[0], -1))

        score, partner = torch.bmm(every_second(num_prefix + first), every_second(num_prefix + 1 - first).mT).max(-1)
        # A in a new order: the rows that merge, then those that stay, in the order of the image
        place, rank = torch.arange(num_a, device=x.device), ranks(score)
        merged = rank < num_merges
        order = torch.where(merged, rank, num_merges - 1 + (~merged).to(torch.int64).cumsum(1))
        # the largest of one: scores that are no numbers tie, and a sum of places would lie outside
        index = torch.where(order[:, None, :] == place[:, None], place, 0).amax(-1)
        rows_a = _rows(x, num_prefix + first + 2 * index)
        target = partner.gather(1, index[:, :num_merges])
        weight = (target[:, None, :] == torch.arange(num_b, device=x.device)[:, None]).to(x.dtype)
        size_a, size_b = x.new_ones(rows_a.shape[:2]), x.new_ones(rows_b.shape[:2])
        if layout.sizes is not None:
            size_a = layout.sizes[:, first::2].to(x.dtype).gather(1, index)
            size_b = layout.sizes[:, 1 - first :: 2].to(x.dtype)
            weight = weight * size_a[:, None, :num_merges]
        size = weight.sum(-1) + size_b
        # means, not sums: the long rows are multiplied once
        weight, own = weight / size.unsqueeze(-1), (size_b / size).unsqueeze(-1)
        coords = layout.coordinates(x.device, x.dtype).to(x.dtype).expand(x.shape[0], -1, -1)

        def after(rows_a: Tensor, rows_b: Tensor) -> list[Tensor]:
            return [rows_a[:, num_merges:], torch.bmm(weight, rows_a[:, :num_merges]) + rows_b * own]

        tokens = torch.cat([x[:, :num_prefix], *after(rows_a, rows_b)], 1)
        coords = torch.cat(after(_rows(coords, first + 2 * index), coords[:, 1 - first :: 2]), 1)
        layout = layout.replace(sizes=torch.cat([size_a[:, num_merges:], size], 1), coords=coords)
        return tokens, layout if self.proportional else without_size_bias(layout)


class DenseMergeAbove(nn.Module):
    """What :class:`vitkit.compress.merge.dymu.MergeAbove` computes, with a fixed number of rows.

    Args:
        merger: whose threshold and limit hold.
        room: patch rows of the result. An image that would keep more merges its best further edges; one that keeps
            fewer is padded at the tail.

    Shape: (B, P+N, D), keys (B, H, P+N, d), layout → (B, P+room, D), layout.
    """

    threshold: Tensor

    def __init__(self, merger: MergeAbove, room: int) -> None:
        super().__init__()
        self.register_buffer("threshold", merger.threshold.clone())
        self.max_merges, self.proportional, self.room = merger.max_merges, merger.proportional, room

    def forward(self, x: Tensor, keys: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        num_prefix = layout.num_prefix
        if x.shape[1] - num_prefix < 2:
            return x, layout
        prefix, patches = x[:, :num_prefix], x[:, num_prefix:]
        first = num_prefix % 2
        valid = patches.new_ones(patches.shape[:2], dtype=torch.bool) if layout.valid is None else layout.valid
        score, partner = edges(keys, layout)
        merged, rank = above(score, self.threshold), ranks(score)
        if self.max_merges is not None:
            merged = merged & (rank < self.max_merges)
        too_many = valid.sum(1, keepdim=True) - self.room
        merged = merged | ((rank < too_many) & (score >= -1))
        stays_a, stays_b = valid[:, first::2] & ~merged, valid[:, 1 - first :: 2]
        place = torch.cat([stays_a, stays_b], 1).to(torch.int64).cumsum(1) - 1
        to_a, to_b = place[:, : score.shape[1]], place[:, score.shape[1] :]
        to_a = torch.where(merged, to_b.gather(1, partner), to_a.masked_fill(~stays_a, -1))
        into = torch.cat([to_a, to_b.masked_fill(~stays_b, -1)], 1)
        rows = torch.cat([patches[:, first::2], patches[:, 1 - first :: 2]], 1)
        places = torch.arange(self.room, device=x.device)
        weight = (into[:, None, :] == places[:, None]).to(x.dtype)
        if layout.sizes is not None:
            size = torch.cat([layout.sizes[:, first::2], layout.sizes[:, 1 - first :: 2]], 1)
            weight = weight * size[:, None].to(x.dtype)
        sizes = weight.sum(-1)
        # rows of size 0 are padding and stay 0
        weight = weight / sizes.clamp(min=1e-6).unsqueeze(-1)
        tokens = torch.cat([prefix, torch.bmm(weight, rows)], 1)
        coords = layout.coordinates(x.device, x.dtype).to(x.dtype).expand(x.shape[0], -1, -1)
        coords = torch.cat([coords[:, first::2], coords[:, 1 - first :: 2]], 1)
        layout = layout.replace(sizes=sizes, coords=torch.bmm(weight, coords), valid=places < place[:, -1:] + 1)
        return tokens, layout if self.proportional else without_size_bias(layout)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, D) of x (B, N, D) at index (B, K): whole rows of one long list, which engines copy in one piece."""
    batch, rows, width = x.shape
    flat = index + rows * torch.arange(batch, device=x.device)[:, None]
    return x.reshape(-1, width).index_select(0, flat.flatten()).view(batch, -1, width)


def ranks(score: Tensor) -> Tensor:
    """Place of every score (B, A) among those of its image, 0 for the highest, the earlier row where they tie.

    Counted, as engines sort slowly.
    """
    places = torch.arange(score.shape[1], device=score.device)
    higher = score[:, None, :] > score[:, :, None]
    tied = (score[:, None, :] == score[:, :, None]) & (places < places[:, None])
    return (higher | tied).sum(-1)


def dense_merges(model: nn.Module, calibration: np.ndarray) -> nn.Module:
    """A copy of a model whose token mergers are dense; the model itself if it has none to replace.

    Args:
        model: in eval mode.
        calibration: images (N, C, H, W) that tell how much room dynamic merging needs.
    """
    vit = find_host(model)
    if vit is None or not any(isinstance(getattr(b, "reduce", None), MergeTokens | MergeAbove) for b in vit.blocks):
        return model
    new = deepcopy(model)
    copy = find_host(new)
    assert copy is not None
    room = _room(new, copy.blocks, calibration)
    for i, block in enumerate(copy.blocks):
        merger = getattr(block, "reduce", None)
        if isinstance(merger, MergeTokens):
            block.reduce = DenseMerge(merger.num_merges, merger.proportional)
        elif isinstance(merger, MergeAbove):
            block.reduce = DenseMergeAbove(merger, room[i])
    return new


@torch.no_grad()
def _room(model: nn.Module, blocks: Iterable[nn.Module], calibration: np.ndarray) -> dict[int, int]:
    """Most patch rows of an image after each block that merges dynamically."""
    room: dict[int, int] = {}
    handles = []
    for i, block in enumerate(blocks):
        if isinstance(getattr(block, "reduce", None), MergeAbove):

            def note(_: nn.Module, __: object, out: tuple[Tensor, TokenLayout], i: int = i) -> None:
                room[i] = max(room.get(i, 1), out[0].shape[1] - out[1].num_prefix)

            handles.append(block.reduce.register_forward_hook(note))
    if handles:
        for part in np.split(calibration, range(32, len(calibration), 32)):
            model(torch.from_numpy(part).to(next(model.parameters()).dtype))
    for handle in handles:
        handle.remove()
    return room
