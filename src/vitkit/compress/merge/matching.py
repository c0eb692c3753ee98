"""Find pairs of similar tokens and merge them: what every token merger shares.

Tokens are split by their place in the whole sequence (prefix included): A holds the patch rows at even places, B those
at odd places. Every row of A has one edge, to its most similar row of B, so an edge never meets another at A.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.anatomy import host
from vitkit.errors import BadInput
from vitkit.models.layout import LogitEdit, TokenLayout
from vitkit.models.normalized import to_model_space
from vitkit.models.swap import Where, pick_blocks
from vitkit.models.vit import Attention, Block, ViT

# B batch · P prefix rows · N patch rows · K rows after merging · D embedding · d head dim

SCHEDULES = ("constant", "linear", "decreasing")
# Two tokens with the same key can differ by 2e-7 in their cosine, depending on where they stand in the matrix
# product. On this grid they tie, and ties go to the first row: an image then merges alike alone and in a padded batch.
_COSINE_GRID = 2.0**20


def token_metric(keys: Tensor, num_prefix: int) -> Tensor:
    """What similarity is measured on: keys (B, H, P+N, d) averaged over heads, without prefix rows → (B, N, d)."""
    return keys.detach()[:, :, num_prefix:].mean(1, dtype=torch.promote_types(keys.dtype, torch.float32))


def bipartite_match(metric: Tensor, valid: Tensor | None = None, first: int = 0) -> tuple[Tensor, Tensor]:
    """The most similar row of B for every row of A.

    ``S[a] = max_b cos(metric_a, metric_b)``, at most 1; ties go to the first b.

    Args:
        metric: (B, N, d), any scale.
        valid: (B, N) bool, False for padding; a padded row takes part on neither side.
        first: 0 if A holds rows 0, 2, 4 …, 1 if it holds rows 1, 3, 5 … (the number of prefix rows modulo 2).

    Returns: score (B, |A|), -inf where there is no edge; partner (B, |A|), a place within B.
    """
    # a cosine of 0.998 is 1 in bf16, and then every pair ties: compare in float32 also under autocast
    with torch.no_grad(), _no_autocast(metric.device.type):
        unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
        a, b = unit[:, first::2], unit[:, 1 - first :: 2]
        if not a.shape[1] or not b.shape[1]:
            return a.new_full(a.shape[:2], -math.inf), torch.zeros(a.shape[:2], dtype=torch.long, device=a.device)
        scores = torch.bmm(a * _COSINE_GRID, b.transpose(1, 2)).round_()
        if valid is not None:
            # filling whole rows of invalid A is left to the end, where it costs |A| instead of |A|·|B|
            scores = scores.masked_fill(~valid[:, None, 1 - first :: 2], -math.inf)
        score, partner = scores.max(dim=-1)
        score = (score / _COSINE_GRID).clamp(max=1.0)
        if valid is not None:
            score = score.masked_fill(~valid[:, first::2], -math.inf)
        return score, partner


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    # the meta device, on which costs are counted, knows no autocast; entering the context takes longer than to ask
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def best_edges(score: Tensor, num_edges: int | Tensor) -> Tensor:
    """(B, |A|) bool: the ``num_edges`` highest scores of every image, the earlier row where they tie.

    Args:
        score: (B, |A|).
        num_edges: one number for all, or (B,).
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    if isinstance(num_edges, int):
        chosen = torch.zeros_like(score, dtype=torch.bool)
        return chosen.scatter_(1, order[:, :num_edges], True)
    taken = torch.arange(score.shape[1], device=score.device) < num_edges[:, None]
    return torch.zeros_like(taken).scatter_(1, order, taken)


def merge_rows(
    x: Tensor, layout: TokenLayout, merged: Tensor, partner: Tensor, first: int, num_kept: int | None = None
) -> tuple[Tensor, TokenLayout]:
    """Merge the chosen rows of A into their partners.

    ``x_b ← Σ size·x / Σ size`` over b and all that join it. New order: prefix, the rows of A that stayed, then B; both
    in their old order, so the order depends on the image alone. Padding moves to the tail.

    Args:
        x: (B, P+N, D).
        layout: of these tokens.
        merged: (B, |A|) bool, which rows of A leave; only rows whose partner is valid.
        partner: (B, |A|), place within B, from :func:`bipartite_match`.
        first: see :func:`bipartite_match`.
        num_kept: K, rows of the result, when it is known beforehand; None: those of the longest image, which
            reads the number back from the device.

    Returns: tokens (B, P+K, D) and their layout.
    """
    batch, num_prefix, device = x.shape[0], layout.num_prefix, x.device
    prefix, patches = x[:, :num_prefix], x[:, num_prefix:]
    valid, num_a = layout.valid, merged.shape[1]
    num_b = patches.shape[1] - num_a
    padded = None
    if valid is None and num_kept is not None:
        # all images lose equally many rows, so B begins at one place in all of them
        places = torch.arange(num_kept, device=device)
        to_b = places[num_kept - num_b :]
        to_a = torch.where(merged, partner + (num_kept - num_b), places[:num_a] - merged.cumsum(1))
    else:
        stays_a = ~merged if valid is None else valid[:, first::2] & ~merged
        stays_b = patches.new_ones(()).bool().expand(batch, num_b) if valid is None else valid[:, 1 - first :: 2]
        place = torch.cat([stays_a, stays_b], dim=1).cumsum(1) - 1
        to_b, num_rows = place[:, num_a:], place[:, -1] + 1
        to_a = torch.where(merged, to_b.gather(1, partner), place[:, :num_a])
        if valid is not None:
            to_a, to_b = to_a.masked_fill(~(stays_a | merged), -1), to_b.masked_fill(~stays_b, -1)
            padded = num_rows
        if num_kept is None:
            shortest, longest = (int(n) for n in torch.stack([num_rows.min(), num_rows.max()]).tolist())
            num_kept, padded = max(longest, 1), (num_rows if shortest < longest else None)
    assign = torch.empty(batch, patches.shape[1], dtype=torch.long, device=device)
    assign[:, first::2] = to_a
    assign[:, 1 - first :: 2] = to_b
    into = assign if valid is None else assign.clamp(min=0)
    # one flat index_add: on CPUs five times faster than scatter_add along the middle axis
    flat = (into + num_kept * torch.arange(batch, device=device)[:, None] if batch > 1 else into).flatten()
    # half precision would lose a small token in a large group: sums are float32. Coordinates and sizes are sums over
    # the same groups and ride along: on short sequences every further call costs more than its arithmetic.
    wide = torch.promote_types(x.dtype, torch.float32)
    coords = layout.coordinates(device, torch.float32)
    ones = coords.new_ones(()).expand(batch, patches.shape[1], 1)
    rows = torch.cat([patches.to(wide), coords.to(wide).expand(batch, -1, -1), ones.to(wide)], dim=-1)
    if layout.sizes is not None:
        rows = rows * layout.sizes.unsqueeze(-1)
    if valid is not None:
        rows = rows * (assign >= 0).unsqueeze(-1)
    summed = rows.new_zeros(batch * num_kept, rows.shape[-1]).index_add_(0, flat, rows.flatten(0, 1))
    summed = summed.unflatten(0, (batch, num_kept))
    sizes = summed[..., -1:].detach()
    # rows of size 0 are padding and stay 0
    mean = summed / (sizes if padded is None else sizes.clamp(min=1e-6))
    width, old = x.shape[-1], layout.source
    new_layout = layout.replace(
        valid=None if padded is None else torch.arange(num_kept, device=device) < padded[:, None],
        sizes=sizes.squeeze(-1).float(),
        coords=mean[..., width:-1].detach().float(),
        source=assign if old is None else torch.where(old >= 0, assign.gather(1, old.clamp(min=0)), old),
        scale_id=None,
    )
    return torch.cat([prefix, mean[..., :width].to(x.dtype)], dim=1), new_layout


def plan_merges(num_tokens: int, target: int, depth: int, schedule: str = "constant") -> list[int]:
    """How many tokens each of ``depth`` blocks merges to come from ``num_tokens`` to ``target``.

    A block can merge half of its tokens at most; what a schedule asks beyond that moves to earlier blocks. The
    remainder of an uneven division goes to the first blocks.

    >>> plan_merges(64, 26, 4), plan_merges(64, 26, 4, "decreasing"), plan_merges(64, 8, 4)
    ([10, 10, 9, 9], [19, 13, 6, 0], [14, 18, 16, 8])

    Args:
        num_tokens: patch tokens entering the first block.
        target: patch tokens to be left after the last, in 1 … num_tokens.
        depth: blocks that merge.
        schedule: "constant", "linear" (from none to twice the mean) or "decreasing" (the reverse).

    Raises: BadInput if halving in every block would not reach ``target``, or the schedule is unknown.
    """
    lowest = math.ceil(num_tokens / 2**depth)
    if not lowest <= target <= num_tokens:
        raise BadInput(
            f"{target} tokens cannot be left of {num_tokens}: {depth} blocks that halve at most leave {lowest}; "
            f"ask for {lowest} to {num_tokens}."
        )
    _known(schedule)
    total = num_tokens - target
    if schedule == "constant" or depth == 1:
        plan = [total // depth + (i < total % depth) for i in range(depth)]
    else:
        # the first i of depth rising shares 0, 1, 2 … make up i(i−1) / depth(depth−1) of the whole
        ends = [round(total * i * (i - 1) / (depth * (depth - 1))) for i in range(depth + 1)]
        rising = [b - a for a, b in pairwise(ends)]
        plan = rising if schedule == "linear" else rising[::-1]
    counts, planned = [num_tokens], num_tokens
    for i, merges in enumerate(plan):
        planned -= merges
        # no block leaves more than the blocks after it can still halve away, nor merges more than half itself
        counts.append(max(math.ceil(counts[-1] / 2), min(planned, target * 2 ** (depth - 1 - i))))
    return [before - after for before, after in pairwise(counts)]


def spread(mean_merges: int, depth: int, schedule: str = "constant") -> list[int]:
    """``mean_merges`` in every block, or growing from 0 to twice that ("linear"), or shrinking ("decreasing").

    >>> spread(8, 4), spread(8, 4, "linear"), spread(8, 4, "decreasing")
    ([8, 8, 8, 8], [0, 5, 10, 16], [16, 10, 5, 0])
    """
    _known(schedule)
    if schedule == "constant" or depth == 1:
        return [mean_merges] * depth
    rising = [2 * mean_merges * i // (depth - 1) for i in range(depth)]
    return rising if schedule == "linear" else rising[::-1]


def _known(schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise BadInput(f"schedule={schedule!r} is unknown; use one of {', '.join(SCHEDULES)}.")


def target_of(num_tokens: int, depth: int, target_tokens: int | None, ratio: float | None) -> int:
    """The number of tokens to leave: as given, or ``(1 − ratio)·N`` rounded; half of N when neither is given."""
    if target_tokens is not None:
        if ratio is not None:
            raise BadInput(f"target_tokens={target_tokens} and ratio={ratio} say the same twice; give one.")
        return target_tokens
    share = 0.5 if ratio is None else ratio
    if not 0 <= share < 1:
        raise BadInput(f"ratio={share} is the share of tokens to merge away; it must be at least 0 and below 1.")
    return max(round(num_tokens * (1 - share)), math.ceil(num_tokens / 2**depth) if ratio is None else 1)


def merging_blocks(vit: ViT, where: Where, who: str) -> list[int]:
    """Indices of the blocks in which ``who`` may merge.

    Raises: BadInput if one of them has no standard attention or merges already.
    """
    chosen = pick_blocks(where, len(vit.blocks))
    for i in chosen:
        block = vit.blocks[i]
        if not isinstance(block, Block) or not isinstance(block.attn, Attention):
            kind = type(getattr(block, "attn", block)).__name__
            raise BadInput(
                f"{who} compares attention keys, and blocks.{i} is a {kind}, which has none; "
                "choose other blocks with where=."
            )
        if block.reduce is not None:
            raise BadInput(
                f"blocks.{i} already reduces its tokens ({type(block.reduce).__name__}); start from the model without "
                "that, or choose other blocks with where=."
            )
    return chosen


def put_reducers(vit: ViT, reducers: dict[int, nn.Module], name: str, options: dict) -> None:
    """Set ``block.reduce`` in place and note in ``vit.applied`` how to do it again."""
    reference = next(vit.parameters())
    for i, reducer in reducers.items():
        vit.blocks[i].reduce = reducer.to(reference.device).train(vit.training)
    vit.applied = [*getattr(vit, "applied", []), {"name": name, "options": options}]  # type: ignore[assignment]


def without_size_bias(layout: TokenLayout) -> TokenLayout:
    """The layout whose log merge sizes no longer count in the attention logits (they still weigh means and pools)."""
    if any(edit is _NO_SIZE_BIAS for edit in layout.edits):
        return layout
    return layout.replace(edits=(*layout.edits, _NO_SIZE_BIAS))


def _minus_log_sizes(q: Tensor, k: Tensor, layout: TokenLayout) -> Tensor:
    assert layout.sizes is not None
    # the very expression the host adds, so that the two cancel to the bit
    log_size = layout.sizes.clamp(min=1e-6).log().to(q.dtype)
    return -F.pad(log_size, (layout.num_prefix, 0))[:, None, None, :]


_NO_SIZE_BIAS = LogitEdit("no proportional attention", "add", _minus_log_sizes)


def forward_tokens(model: nn.Module, images: Tensor) -> tuple[Tensor, TokenLayout]:
    """The tokens a downstream model reads: (B, P+N', D) after the final norm, and their layout.

    ``tokens[:, layout.num_prefix:]`` are the patch rows, ``layout.source`` (B, N_1) says which of them holds each
    original patch, ``layout.sizes`` how many patches a row stands for, and ``layout.unmerge(values)`` lays values of
    rows back on all patches.

    Args:
        model: a host or a wrapper around one, merging or not.
        images: (B, C, H, W), in [0, 1] if the model normalises itself.
    """
    vit = host(model)
    x, layout = vit.embed(to_model_space(model, images))
    x, layout = vit.run(x, layout)
    return vit.norm(x), layout
