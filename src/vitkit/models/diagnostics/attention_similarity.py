"""Has a model learned to attend? Its attention maps beside those of a reference, their entropy and their reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitkit.anatomy.capture import Trace
from vitkit.anatomy.host import host
from vitkit.anatomy.untouched import untouched
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout

# B images · H heads · P prefix tokens · N patches · L blocks


@dataclass(frozen=True)
class SimilarityRow:
    """Attention of one block beside the reference's block at the same relative depth; means over the images.

    Attributes:
        depth: index of the block. reference_depth: that of the block it is compared with.
        cosine: between the maps, in [0, 1]. Maps are positive, so two unrelated ones are alike, too.
        centred: between the maps minus their means, in [−1, 1]: 0 for unrelated ones, or where a map is even.
        entropy: of a query's attention over log of the number of keys, in [0, 1]; 1 is attention to everything alike.
        distance: between a patch and what it attends to, over the image's diagonal.
        reference_entropy, reference_distance: of the reference.
    """

    depth: int
    reference_depth: int
    cosine: float
    centred: float
    entropy: float
    distance: float
    reference_entropy: float
    reference_distance: float


@dataclass(frozen=True)
class AttentionSimilarity:
    """Attributes: rows: one a block. cosine, centred: means over the blocks."""

    rows: tuple[SimilarityRow, ...]
    cosine: float
    centred: float


@torch.no_grad()
def attention_similarity(model: nn.Module, reference: nn.Module, images: Tensor) -> AttentionSimilarity:
    """Attention-learning score: how alike the attention maps of two models are.

    A block's map is the attention of the class token to the patches, mean over heads, or of the mean patch query in a
    host without a class token. With m and r the maps (N_1,) of an image, merged patches sharing their token's
    attention: ``cosine = m·r / (‖m‖‖r‖)``, and likewise after their means are taken off. If the depths differ, block ℓ
    of L is compared with block round(ℓ·(L_r − 1)/(L − 1)) of the reference.

    Args:
        model: a host or a wrapper around one; left as found.
        reference: likewise, on the same patch grid; for the score of a paper, a trained ViT.
        images: (B, C, H, W) in [0, 1].

    Raises: BadInput if the grids differ or weights are not between all tokens; LookupError if a block has no attention
        weights.
    Paper: ConvShareViT, arXiv:2504.11517.
    Departs from the paper: known by its abstract, so the score is ours; ``centred`` is there because the plain cosine
        of two even maps is 1.
    """
    own, theirs = _maps(model, images), _maps(reference, images)
    if own[0].grid != theirs[0].grid:
        raise BadInput(
            f"The model attends on a grid of {own[0].grid}, the reference on {theirs[0].grid}; compare models with the "
            "same patches at one image size."
        )
    rows = []
    for depth, seen in enumerate(own):
        other = round(depth * (len(theirs) - 1) / max(1, len(own) - 1))
        match = theirs[other]
        rows.append(
            SimilarityRow(
                depth=depth,
                reference_depth=other,
                cosine=_cosine(seen.map, match.map),
                centred=_cosine(_centre(seen.map), _centre(match.map)),
                entropy=seen.entropy,
                distance=seen.distance,
                reference_entropy=match.entropy,
                reference_distance=match.distance,
            )
        )
    return AttentionSimilarity(
        rows=tuple(rows),
        cosine=sum(row.cosine for row in rows) / len(rows),
        centred=sum(row.centred for row in rows) / len(rows),
    )


@dataclass(frozen=True)
class _Seen:
    grid: tuple[int, ...]
    map: Tensor
    entropy: float
    distance: float


def _maps(model: nn.Module, images: Tensor) -> list[_Seen]:
    vit = host(model)
    with untouched(model), Trace(vit, "blocks.*.attn.weights") as trace:
        model(images)
    return [
        _of_block(depth, weights, trace.layouts[f"blocks.{depth}.attn.weights"])
        for depth, weights in enumerate(trace.stack("attn.weights"))
    ]


def _of_block(depth: int, weights: Tensor, layout: TokenLayout) -> _Seen:
    weights = weights.double()
    num_prefix = layout.num_prefix
    if weights.ndim != 4 or weights.shape[-1] != weights.shape[-2]:
        raise BadInput(f"blocks.{depth} attends by weights of shape {tuple(weights.shape)}, not (B, H, n, n).")
    real = layout.key_mask()
    rows = torch.ones(weights.shape[0], weights.shape[-1], dtype=torch.bool, device=weights.device)
    rows = rows if real is None else real
    # entropy over all keys of all real queries
    terms = -(weights * weights.clamp(min=1e-30).log()).sum(-1).mean(1)
    limit = rows.sum(1).clamp(min=2).double().log()
    entropy = ((terms * rows).sum(1) / rows.sum(1) / limit).mean()
    patches, patch_rows = weights[:, :, num_prefix:, num_prefix:], rows[:, num_prefix:]
    coords = layout.coordinates(weights.device).double().expand(len(weights), -1, -1)
    apart = torch.cdist(coords, coords)[:, None] / math.sqrt(2)
    share = patches / patches.sum(-1, keepdim=True).clamp(min=1e-30)
    reach = (share * apart).sum(-1).mean(1)
    distance = ((reach * patch_rows).sum(1) / patch_rows.sum(1)).mean()
    if "class" in dict(layout.prefix):
        query = weights[:, :, layout.prefix_slice("class").start, num_prefix:].mean(1)
    else:
        queries = patches.mean(1) * patch_rows[..., None]
        query = queries.sum(1) / patch_rows.sum(1, keepdim=True)
    if layout.sizes is not None:
        query = query / layout.sizes.clamp(min=1)
    return _Seen(layout.grid, layout.unmerge(query), float(entropy), float(distance))


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a, b, dim=1, eps=1e-12).mean())


def _centre(maps: Tensor) -> Tensor:
    return maps - maps.mean(1, keepdim=True)
