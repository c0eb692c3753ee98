"""Token merging (ToMe): a fixed number of similar tokens becomes one another in every block."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.anatomy import host
from vitkit.compress.change import Change
from vitkit.compress.cost import count_params
from vitkit.compress.merge.matching import (
    best_edges,
    bipartite_match,
    forward_tokens,
    merge_rows,
    merging_blocks,
    plan_merges,
    put_reducers,
    spread,
    target_of,
    token_metric,
    without_size_bias,
)
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.normalized import to_model_space
from vitkit.models.swap import Where


class MergeTokens(nn.Module):
    """Merge the ``num_merges`` most similar pairs of patch tokens of every image.

    All counts are known from the shapes, so the module compiles to one graph and exports.

    Args:
        num_merges: r, tokens to merge; at most half of the patch tokens are.
        proportional: let a merged token count in later softmaxes as often as it has patches.

    Shape: (B, P+N, D), keys (B, H, P+N, d), layout → (B, P+N−r, D), layout.
    """

    def __init__(self, num_merges: int, proportional: bool = True) -> None:
        super().__init__()
        self.num_merges, self.proportional = num_merges, proportional

    def forward(self, x: Tensor, keys: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        num_tokens = x.shape[1] - layout.num_prefix
        num_merges = min(self.num_merges, num_tokens // 2)
        if num_merges == 0:
            return x, layout
        first = layout.num_prefix % 2
        score, partner = bipartite_match(token_metric(keys, layout.num_prefix), layout.valid, first)
        merged = best_edges(score, num_merges)
        if layout.valid is not None:
            # an image with little but padding may have fewer edges than r
            merged = merged & score.isfinite()
        x, layout = merge_rows(x, layout, merged, partner, first, num_tokens - num_merges)
        return x, layout if self.proportional else without_size_bias(layout)

    def extra_repr(self) -> str:
        return f"num_merges={self.num_merges}, proportional={self.proportional}"


def tome(
    model: nn.Module,
    images: Tensor | None = None,
    r: int | None = None,
    ratio: float | None = None,
    schedule: str = "constant",
    where: Where = "all",
    proportional: bool = True,
) -> tuple[nn.Module, Change]:
    """Make a ViT faster by merging similar tokens between attention and MLP of its blocks; no training.

    In each block the r edges with the largest ``cos(k̄_a, k̄_b)`` are merged, k̄ the attention key averaged over heads,
    a an even and b an odd token: ``x_b ← Σ size·x / Σ size``. Later attention is
    ``softmax(q kᵀ/√d + log size) v``, so merging tokens that are equal changes nothing for the others.

    >>> import torch
    >>> from vitkit.models.build import build
    >>> vit = build("vit_femto", img_size=16, in_chans=1, num_classes=3).eval()
    >>> merged, change = tome(vit, r=8)
    >>> change.details["tokens"]
    [64, 56, 48, 40, 32]
    >>> tokens, layout = forward_tokens(merged, torch.rand(2, 1, 16, 16))
    >>> tokens.shape[1] - layout.num_prefix, layout.sizes.sum(1)
    (32, tensor([64., 64.]))

    Args:
        model: holds a plain ViT; it is not changed.
        images: (B, C, H, W) in the model's own pixel range; gives the number of tokens when it is not the model's
            usual one, and the new model is tried on one of them. Not needed otherwise.
        r: tokens to merge in each block (mean of a block for the other schedules), at least 0.
        ratio: in place of r, the share of all patch tokens that is merged away by the last block, in [0, 1).
            With neither, 0.5.
        schedule: "constant", "linear" (from 0 to 2r over the blocks) or "decreasing" (the reverse).
        where: blocks that merge: "all", "last:3", an index, several …
        proportional: False leaves ``log size`` out of the softmax (an ablation; it costs accuracy).

    Returns: the merging model, with the same parameters, and the :class:`Change`.

    Raises:
        TypeError: there is no plain ViT in ``model``.
        BadInput: r or ratio is out of range, a chosen block has no attention keys or merges already.

    Paper: Bolya et al., Token Merging: Your ViT But Faster, arXiv:2210.09461; the base that DToMe extends in
    DyMU, arXiv:2504.17040.
    Departs from the paper: prefix tokens (class, registers, prompts) never merge; cosines are compared in float32 on
    a grid of 2⁻²⁰, so that equal tokens tie on every machine.
    """
    new = deepcopy(model)
    vit = host(new)
    blocks = merging_blocks(vit, where, "tome")
    num_tokens = count_patches(new, images)
    if r is not None:
        if ratio is not None:
            raise BadInput(f"r={r} and ratio={ratio} say the same twice; give one.")
        if r < 0:
            raise BadInput(f"r={r} tokens cannot be merged; use 0 or more.")
        merges = spread(r, len(blocks), schedule)
    else:
        target = target_of(num_tokens, len(blocks), None, ratio)
        merges = plan_merges(num_tokens, target, len(blocks), schedule)
    restore(new, {"blocks": blocks, "merges": merges, "proportional": proportional})
    tokens = [num_tokens]
    for count in merges:
        tokens.append(tokens[-1] - min(count, tokens[-1] // 2))
    if images is not None and len(images):
        try_once(new, images)
    change = Change(
        what=f"merges {num_tokens - tokens[-1]} of {num_tokens} patch tokens over {len(blocks)} blocks (ToMe)",
        params_before=count_params(model),
        params_after=count_params(new),
        touched=tuple(f"blocks.{i}.reduce" for i in blocks),
        lost="patch tokens are no longer the cells of the grid; maps come back through layout.unmerge",
        details={"tokens": tokens, "merges": merges, "blocks": blocks, "proportional": proportional, "realised": "yes"},
    )
    return new, change


def restore(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Set the mergers of an earlier :func:`tome` in a fresh model, in place; there is nothing to load in them."""
    reducers: dict[int, nn.Module] = {
        i: MergeTokens(count, options["proportional"]) for i, count in zip(options["blocks"], options["merges"])
    }
    put_reducers(host(model), reducers, "tome", options)
    return model


def count_patches(model: nn.Module, images: Tensor | None) -> int:
    """Patch tokens entering the first block: of ``images`` if given, else of the model's own image size."""
    vit = host(model)
    if images is None or not len(images):
        height, width = vit.patch_embed.grid_size
        return height * width
    with torch.no_grad():
        x, layout = vit.embed(to_model_space(model, on_device(model, images[:1])))
    return x.shape[1] - layout.num_prefix


@torch.no_grad()
def try_once(model: nn.Module, images: Tensor) -> None:
    """One image through the new model, so that what cannot work with merged tokens says so at once."""
    training = [m.training for m in model.modules()]
    model.eval()
    try:
        model(on_device(model, images[:1]))
    finally:
        for module, mode in zip(model.modules(), training):
            module.training = mode


def on_device(model: nn.Module, images: Tensor) -> Tensor:
    """Images where the model's parameters are."""
    return images.to(next(model.parameters()).device)


__all__ = ["MergeTokens", "forward_tokens", "restore", "tome"]
