"""Dynamic token merging (DToMe of DyMU): simple images keep few tokens, complex ones many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from copy import deepcopy
from dataclasses import dataclass
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
    target_of,
    token_metric,
    without_size_bias,
)
from vitkit.compress.merge.tome import count_patches, on_device, try_once
from vitkit.compress.walker import images_of
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.swap import Where

Progress = Callable[[str, int, int], None]

_SLACK = 2.0**-19
# the largest threshold that is learned; equal tokens, with S = 1, stay above it
_BELOW_ONE = 1 - 2 * _SLACK


class MergeAbove(nn.Module):
    """Merge every pair of patch tokens whose cosine is above a threshold.

    Images of a batch then differ in length: the batch is padded to its longest image, with the padding at the tail
    and masked as keys. One image alone has no padding; both give the same output. The longest length is read back
    from the device, so the module compiles with graph breaks and does not export.

    Args:
        threshold: τ; a cosine never exceeds 1, so τ = 1 merges nothing.
        max_merges: at most so many merges per image; None: half of its patch tokens.
        proportional: let a merged token count in later softmaxes as often as it has patches.

    Shape: (B, P+N, D), keys (B, H, P+N, d), layout → (B, P+N', D), layout.
    """

    threshold: Tensor

    def __init__(self, threshold: float = 1.0, max_merges: int | None = None, proportional: bool = True) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float32))
        self.max_merges, self.proportional = max_merges, proportional

    def forward(self, x: Tensor, keys: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        if x.shape[1] - layout.num_prefix < 2:
            return x, layout
        first = layout.num_prefix % 2
        score, partner = edges(keys, layout)
        merged = above(score, self.threshold)
        if self.max_merges is not None and self.max_merges < score.shape[1]:
            merged = merged & best_edges(score, self.max_merges)
        x, layout = merge_rows(x, layout, merged, partner, first)
        return x, layout if self.proportional else without_size_bias(layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergeAbove:
        precise = self.threshold
        super()._apply(fn, recurse)
        # model.bfloat16() would round a threshold of 0.999 to 1, and nothing would merge any more
        if not precise.is_meta:
            self.threshold = precise.to(self.threshold.device)
        return self

    def extra_repr(self) -> str:
        return f"threshold={float(self.threshold):.4f}, max_merges={self.max_merges}, proportional={self.proportional}"


class FindThreshold(nn.Module):
    """Learn the threshold of one block: stands in the place of :class:`MergeAbove` while calibration images pass.

    Of all edges of a batch the best ``B·r`` are kept; τ of the batch is the first score not kept, at least 0. The batch
    is merged with that τ, so later blocks learn on the tokens they will meet. ``threshold`` is the running mean of τ.
    A learned τ stays below 1, so that equal tokens merge even where there are more of them than planned.

    Args:
        num_merges: r, the mean number of merges per image; with 0, τ = 1.
    """

    def __init__(self, num_merges: int, proportional: bool = True) -> None:
        super().__init__()
        self.num_merges, self.proportional = num_merges, proportional
        self.batch_thresholds: list[float] = []
        self.mean_merges: list[float] = []

    @property
    def threshold(self) -> float:
        return math.fsum(self.batch_thresholds) / len(self.batch_thresholds)

    def forward(self, x: Tensor, keys: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        score, partner = edges(keys, layout)
        pooled = score[score.isfinite()].sort(descending=True).values
        rank = x.shape[0] * self.num_merges
        if self.num_merges == 0:
            threshold = 1.0
        else:
            # where more than B·r edges join equal tokens, the first not kept has S = 1, and S > 1 would merge none
            threshold = min(max(0.0, float(pooled[rank])), _BELOW_ONE) if rank < len(pooled) else 0.0
        merged = above(score, threshold)
        self.batch_thresholds.append(threshold)
        self.mean_merges.append(float(merged.sum()) / x.shape[0])
        x, layout = merge_rows(x, layout, merged, partner, layout.num_prefix % 2)
        return x, layout if self.proportional else without_size_bias(layout)


def edges(keys: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Edges of :func:`bipartite_match`, limited to half of the patch tokens of each image.

    An image of 2m+1 tokens can have m+1 rows in A; its last one then has no edge.
    """
    metric, first, valid = token_metric(keys, layout.num_prefix), layout.num_prefix % 2, layout.valid
    score, partner = bipartite_match(metric, valid, first)
    if valid is None:
        half = metric.shape[1] // 2
        if score.shape[1] > half:
            score = torch.cat([score[:, :half], torch.full_like(score[:, half:], -math.inf)], dim=1)
    else:
        nth = valid[:, first::2].cumsum(1)
        score = score.masked_fill(nth > valid.sum(1, keepdim=True) // 2, -math.inf)
    return score, partner


def above(score: Tensor, threshold: Tensor | float) -> Tensor:
    """``S > τ``, by more than rounding can make of two equal cosines.

    τ of a batch is the score of one of its edges, and that edge must stay unmerged also when its image comes back
    alone or in another batch.
    """
    return score - threshold > _SLACK


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds learned by :func:`fit_thresholds`; :meth:`apply` puts them in a model.

    Args:
        blocks: indices of the merging blocks.
        tau: τ of each.
        merges: r, the planned mean number of merges in each.
        num_tokens: patch tokens entering the first block.
        target_tokens: planned mean number of patch tokens after the last.
        num_images: calibration images.
        batch_tau: τ of each block in each calibration batch; their means are ``tau``.
        batch_merges: mean merges per image of each block in each batch, with that batch's own τ.
        proportional: whether proportional attention was on.
    """

    blocks: tuple[int, ...]
    tau: tuple[float, ...]
    merges: tuple[int, ...]
    num_tokens: int
    target_tokens: int
    num_images: int
    batch_tau: tuple[tuple[float, ...], ...]
    batch_merges: tuple[tuple[float, ...], ...]
    proportional: bool = True

    def apply(self, model: nn.Module, cap: float | None = None) -> nn.Module:
        """A copy of ``model`` that merges with these thresholds.

        Args:
            model: the model they were learned on, not merging yet.
            cap: at most ``cap · r`` merges per image and block, cap ≥ 1; None: half of the tokens.

        Raises: BadInput if a block merges already or the cap is below 1.
        """
        if cap is not None and cap < 1:
            raise BadInput(f"cap={cap} would merge less than the mean that was planned; use 1 or more, or None.")
        new = deepcopy(model)
        merging_blocks(host(new), self.blocks, "dymu")
        limits = [None if cap is None else math.ceil(cap * r) for r in self.merges]
        options = {"blocks": list(self.blocks), "max_merges": limits, "proportional": self.proportional}
        restore(new, options)
        for i, tau in zip(self.blocks, self.tau):
            host(new).blocks[i].reduce.threshold.fill_(tau)
        return new


@torch.no_grad()
def fit_thresholds(
    model: nn.Module,
    images: Tensor | Iterable[Any],
    target_tokens: int | None = None,
    ratio: float | None = None,
    schedule: str = "constant",
    where: Where = "all",
    proportional: bool = True,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Thresholds:
    """Learn one threshold per block, so that images keep ``target_tokens`` on average; one pass, no labels.

    Args:
        model: holds a plain ViT; it is not changed.
        images: (B, C, H, W), or an iterable of batches (tensors, or tuples that begin with one). A few thousand
            settle the thresholds; each batch should have 64 or more.
        target_tokens: mean patch tokens after the last block.
        ratio: in its place, the share of the patch tokens that is merged away, in [0, 1). With neither, 0.5.
        schedule: of the merges over the blocks: "constant", "linear" (rising) or "decreasing".
        where: blocks that merge.
        proportional: whether merged tokens count in softmaxes as often as they have patches.
        batch_size: for a tensor of images: about so many at a time, in equal parts.
        progress: called as ``progress("thresholds", batches done, batches)``.

    Raises:
        TypeError: there is no plain ViT in ``model``.
        BadInput: no images, a target out of reach, or a chosen block that cannot merge.
    """
    new = deepcopy(model).eval()
    vit = host(new)
    blocks = merging_blocks(vit, where, "dymu")
    batches, total = _batches(images, batch_size)
    finders: list[FindThreshold] = []
    num_tokens = target = num_images = 0
    merges: list[int] = []
    for done, batch in enumerate(batches, 1):
        if not finders:
            num_tokens = count_patches(new, batch)
            target = target_of(num_tokens, len(blocks), target_tokens, ratio)
            merges = plan_merges(num_tokens, target, len(blocks), schedule)
            finders = [FindThreshold(count, proportional) for count in merges]
            for i, finder in zip(blocks, finders):
                vit.blocks[i].reduce = finder
        forward_tokens(new, on_device(new, batch))
        num_images += len(batch)
        if progress:
            progress("thresholds", done, total or done)
    if not finders:
        raise BadInput("dymu learns its thresholds from images and got none; give at least 64, without labels.")
    return Thresholds(
        blocks=tuple(blocks),
        tau=tuple(f.threshold for f in finders),
        merges=tuple(merges),
        num_tokens=num_tokens,
        target_tokens=target,
        num_images=num_images,
        batch_tau=tuple(zip(*(f.batch_thresholds for f in finders))),
        batch_merges=tuple(zip(*(f.mean_merges for f in finders))),
        proportional=proportional,
    )


def dymu(
    model: nn.Module,
    images: Tensor | Iterable[Any] | None,
    target_tokens: int | None = None,
    ratio: float | None = None,
    schedule: str = "constant",
    where: Where = "all",
    proportional: bool = True,
    cap: float | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> tuple[nn.Module, Change]:
    """Merge as many tokens as each image allows: ToMe with a threshold per block in place of a number.

    Block i merges every edge with ``S > τ_i``, S the cosine of the head-averaged keys; τ_i is the running mean over
    calibration batches of the score that keeps the best ``B·r_i`` edges of a batch, with ``Σ r_i = N − target``. No
    training. The thresholds are buffers, so they are saved with the weights. For a downstream language model that must
    see all N positions see :func:`vitkit.compress.merge.vtu.vtu_attention`.

    >>> import torch
    >>> from vitkit.models.build import build
    >>> vit = build("vit_femto", img_size=16, in_chans=1, num_classes=3).eval()
    >>> images = torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> merged, change = dymu(vit, images, target_tokens=40)
    >>> abs(change.details["mean_tokens"] - 40) < 1
    True

    Args:
        model: holds a plain ViT; it is not changed.
        images: calibration images (B, C, H, W) in the model's own pixel range, or an iterable of batches.
        target_tokens: mean patch tokens after the last block.
        ratio: in its place, the share of the patch tokens that is merged away, in [0, 1). With neither, 0.5.
        schedule: of the planned merges: "constant", "linear" (rising) or "decreasing".
        where: blocks that merge: "all", "last:3", an index, several …
        proportional: False leaves ``log size`` out of the softmax (an ablation; it costs accuracy).
        cap: at most ``cap · r_i`` merges per image in block i, cap ≥ 1; None: half of the tokens.
        batch_size: calibration images at a time.
        progress: called as ``progress("thresholds", batches done, batches)``.

    Returns: the merging model and the :class:`Change`; its details hold τ, and the number of tokens that images
        really keep.

    Raises:
        TypeError: there is no plain ViT in ``model``.
        BadInput: no images, a target out of reach, or a chosen block that cannot merge.

    Paper: Wang et al., DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs, arXiv:2504.17040.
    Departs from the paper: prefix tokens never merge; cosines are compared in float32 on a grid of 2⁻²⁰, ``S > τ``
    means by more than 2⁻¹⁹, and a learned τ is at most 1 − 2⁻¹⁸, so that equal tokens always merge; the log-size bias
    stands before the softmax in every path (the released code adds it after, where attention is not fused).
    """
    if images is None:
        raise BadInput("dymu learns its thresholds from images; give at least 64 as images=…, without labels.")
    kept: list[Tensor] = []
    found = fit_thresholds(
        model,
        images if isinstance(images, Tensor) else _remember(images, kept),
        target_tokens=target_tokens,
        ratio=ratio,
        schedule=schedule,
        where=where,
        proportional=proportional,
        batch_size=batch_size,
        progress=progress,
    )
    new = found.apply(model, cap=cap)
    sample = images[:256] if isinstance(images, Tensor) else torch.cat(kept)[:256]
    try_once(new, sample)
    counts = count_tokens(new, sample, batch_size)
    few = "" if found.num_images >= 64 else f"; thresholds come from only {found.num_images} images, 64 are too few"
    change = Change(
        what=f"merges similar patch tokens over {len(found.blocks)} blocks: {found.num_tokens} become "
        f"{counts.float().mean():.1f} on average, {int(counts.min())} to {int(counts.max())} (DToMe)",
        params_before=count_params(model),
        params_after=count_params(new),
        touched=tuple(f"blocks.{i}.reduce" for i in found.blocks),
        lost="patch tokens are no longer the cells of the grid (maps come back through layout.unmerge), and their "
        f"number depends on the image, so a batch costs what its longest image costs{few}",
        details={
            "thresholds": list(found.tau),
            "threshold_sd": [_sd(column) for column in zip(*found.batch_tau)],
            "planned_merges": list(found.merges),
            "blocks": list(found.blocks),
            "num_tokens": found.num_tokens,
            "target_tokens": found.target_tokens,
            "mean_tokens": float(counts.float().mean()),
            "sd_tokens": float(counts.float().std(correction=0)),
            "calibration_images": found.num_images,
            "proportional": proportional,
            "realised": "yes",
        },
    )
    return new, change


def restore(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Set the mergers of an earlier :func:`dymu` in a fresh model, in place; thresholds come with the state dict."""
    reducers: dict[int, nn.Module] = {
        i: MergeAbove(max_merges=limit, proportional=options["proportional"])
        for i, limit in zip(options["blocks"], options["max_merges"])
    }
    put_reducers(host(model), reducers, "dymu", options)
    return model


@torch.no_grad()
def count_tokens(model: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """Patch tokens that each image has after the last block, (B,) long; the model is left as found."""
    training = [m.training for m in model.modules()]
    model.eval()
    counts = []
    try:
        for batch in images.split(batch_size):
            x, layout = forward_tokens(model, on_device(model, batch))
            rows = x.shape[1] - layout.num_prefix
            counts.append(layout.valid.sum(1) if layout.valid is not None else x.new_full((len(batch),), rows).long())
    finally:
        for module, mode in zip(model.modules(), training):
            module.training = mode
    return torch.cat(counts).cpu()


def _batches(images: Tensor | Iterable[Any], batch_size: int) -> tuple[Iterator[Tensor], int]:
    if isinstance(images, Tensor):
        # equal parts: a small last batch would weigh as much in the mean as the others
        parts = images_of(images).tensor_split(max(1, round(len(images) / batch_size))) if len(images) else ()
        return iter(parts), len(parts)
    total = len(images) if isinstance(images, Sized) else 0
    return (images_of(batch) for batch in images), total


def _remember(batches: Iterable[Any], kept: list[Tensor], at_most: int = 256) -> Iterator[Tensor]:
    """Pass batches on, keeping the first images for a measurement after the pass."""
    for batch in batches:
        found = images_of(batch)
        if sum(len(k) for k in kept) < at_most:
            kept.append(found)
        yield found


def _sd(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values)).std(correction=0))


__all__ = [
    "FindThreshold",
    "MergeAbove",
    "Thresholds",
    "count_tokens",
    "dymu",
    "fit_thresholds",
    "forward_tokens",
    "restore",
]
