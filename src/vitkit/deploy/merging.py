"""Token merging as an engine runs it best: a handful of dense operations in place of sorting, gathering, scattering.

PyTorch's form (:mod:`vitkit.compress.merge.matching`) adds rows by index, which engines convert badly or run one by
one. Here the rows of A move by one product with a matrix of zeros and ones, which costs a few percent of a block, and
nothing is noted that only an explanation would read (where each patch went).
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.anatomy.host import find_host
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
    Raises: BadInput where positions follow the notes that are left out here.
    """

    def __init__(self, num_merges: int, proportional: bool) -> None:
        super().__init__()
        self.num_merges, self.proportional = num_merges, proportional

    def forward(self, x: Tensor, keys: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        if layout.rotation is not None or layout.valid is not None:
            raise BadInput("merged tokens of a model with rotary positions or padding run in PyTorch only.")
        num_prefix = layout.num_prefix
        prefix, patches = x[:, :num_prefix], x[:, num_prefix:]
        num_merges = min(self.num_merges, patches.shape[1] // 2)
        if num_merges == 0:
            return x, layout
        num_kept = patches.shape[1] - num_merges
        first = num_prefix % 2
        rows_a, rows_b = patches[:, first::2], patches[:, 1 - first :: 2]
        num_a, stay = rows_a.shape[1], num_kept - rows_b.shape[1]
        unit = F.normalize(keys[:, :, num_prefix:].mean(1), dim=-1)
        score, partner = (unit[:, first::2] @ unit[:, 1 - first :: 2].mT).max(-1)
        # the place of every edge in the order of their scores, counted: engines sort slowly
        places = torch.arange(num_kept, device=x.device)
        higher = score[:, None, :] > score[:, :, None]
        tied = (score[:, None, :] == score[:, :, None]) & (places[:num_a] < places[:num_a, None])
        merged = (higher | tied).sum(-1) < num_merges
        to_a = torch.where(merged, partner + stay, places[:num_a] - merged.to(torch.int64).cumsum(1))
        weight = (to_a[:, None, :] == places[:, None]).to(x.dtype)
        size_b = x.new_ones(1, 1).expand(x.shape[0], rows_b.shape[1])
        if layout.sizes is not None:
            weight = weight * layout.sizes[:, None, first::2].to(x.dtype)
            size_b = layout.sizes[:, 1 - first :: 2].to(x.dtype)
        sizes = weight.sum(-1) + F.pad(size_b, (stay, 0))
        # means, not sums: the long rows are multiplied once
        weight = weight / sizes.unsqueeze(-1)
        into_b = weight[:, stay:] @ rows_a + rows_b * (size_b / sizes[:, stay:]).unsqueeze(-1)
        tokens = torch.cat([prefix, weight[:, :stay] @ rows_a, into_b], 1)
        layout = layout.replace(sizes=sizes)
        return tokens, layout if self.proportional else without_size_bias(layout)


def dense_merges(model: nn.Module) -> nn.Module:
    """A copy of a model whose token mergers are :class:`DenseMerge`; the model itself if it has none to replace."""
    vit = find_host(model)
    if vit is None or not any(isinstance(b.reduce, MergeTokens) for b in vit.blocks if hasattr(b, "reduce")):
        return model
    new = deepcopy(model)
    copy = find_host(new)
    assert copy is not None
    for block in copy.blocks:
        merger = getattr(block, "reduce", None)
        if isinstance(merger, MergeTokens):
            block.reduce = DenseMerge(merger.num_merges, merger.proportional)
    return new
