"""Attention as a flow between tokens: head weights, fusion over heads, and the product over blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitkit.anatomy import Trace, host, untouched
from vitkit.errors import BadInput, unknown
from vitkit.explain.base import Explanation, differentiable, for_model, in_chunks, resolve_target
from vitkit.models.layout import TokenLayout

# B batch · L blocks · H heads · n = P+N rows of a block · T = P+N₁ prefix and original patches

FUSIONS = ("mean", "max", "min", "gmar_l1", "gmar_l2")
SCOPES = ("layer", "all")


@dataclass(frozen=True, eq=False)
class Attentions:
    """What the blocks of a model attended to in one forward.

    Attributes:
        weights: per block (B, H, n, n), softmax outputs, float32.
        grads: per block ∂y_c/∂A of the same shape, or empty when no gradient was asked for.
        layouts: per block, the tokens its attention saw.
        target: (B,) the output c.
        reads_class: True if the model's output is read from its class token.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    layouts: list[TokenLayout]
    target: Tensor
    reads_class: bool


def trace_attention(
    model: nn.Module, images: Tensor, target: Tensor | int | None = None, grad: bool = False
) -> Attentions:
    """Attention weights of all blocks, with the gradient of each image's target logit if ``grad``.

    One forward and one backward of ``Σ_b y_{b,c(b)}``: images do not mix, so every image gets its own gradient.

    Raises:
        TypeError: there is no plain ViT inside. LookupError: a block has no attention weights.
        BadInput: a block's weights are not a square matrix over its tokens.
    """
    vit = host(model)
    sites = [f"blocks.{i}.attn.weights" for i in range(len(vit.blocks))]
    with untouched(model), differentiable(), torch.set_grad_enabled(grad):
        with Trace(vit, sites, grad=grad) as trace:
            logits = model(for_model(model, images))
        chosen = resolve_target(logits, target)
        if grad:
            logits.gather(1, chosen.unsqueeze(1)).sum().backward()
    weights = [trace[site].detach().float() for site in sites]
    layouts = [trace.layouts[site] for site in sites]
    for i, (weight, layout) in enumerate(zip(weights, layouts)):
        rows = layout.num_prefix + _num_rows(layout)
        if weight.ndim != 4 or weight.shape[0] != len(images) or weight.shape[-2:] != (rows, rows):
            raise BadInput(
                f"blocks.{i} ({type(vit.blocks[i].attn).__name__}) attends by weights of shape {tuple(weight.shape)}, "
                f"not (B, H, {rows}, {rows}) between all tokens, so attention cannot be followed through it; "
                "use grad-cam for this model."
            )
    by_class = vit.global_pool == "token" or vit.read_out is not None
    return Attentions(
        weights=weights,
        grads=[trace.grad(site).detach().float() for site in sites] if grad else [],
        layouts=layouts,
        target=chosen.detach(),
        reads_class=by_class and any(name == "class" for name, _ in layouts[-1].prefix),
    )


def head_weights(grads: Sequence[Tensor], norm: str = "l1", scope: str = "layer") -> list[Tensor]:
    """How much each head counts: the size of the gradient that reaches its attention.

    ``g_{l,h} = Σ_ij |G_ij|`` (l1) or ``√Σ_ij G_ij²`` (l2). Scope ``"layer"``: ``w_{l,h} = g_{l,h} / Σ_h g_{l,h}``;
    ``"all"``: ``w_{l,h} = L·g_{l,h} / Σ_{l,h} g_{l,h}``. Where the sum is 0, heads of a block share equally.

    Args:
        grads: per block (B, H, n, n).
        norm: "l1" or "l2".
        scope: "layer" or "all".

    Returns: per block (B, H), not negative; sums to 1 per block ("layer") or to L over all blocks ("all").
    Raises: UnknownName for another norm or scope.
    """
    if norm not in ("l1", "l2"):
        raise unknown("norm", norm, ("l1", "l2"), "vitkit show gmar")
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES, "vitkit show gmar")
    # a gradient of 1e-30 is still a direction, but its square is 0 in float32: scale by the image's largest entry
    peak = torch.stack([g.abs().flatten(1).amax(1) for g in grads]).amax(0)
    unit = torch.where(peak > 0, peak, 1.0)[:, None, None, None]
    scaled = [g / unit for g in grads]
    sizes = [g.abs().sum((-2, -1)) if norm == "l1" else g.square().sum((-2, -1)).sqrt() for g in scaled]
    uniform = [torch.full_like(size, 1 / size.shape[1]) for size in sizes]
    if scope == "layer":
        totals = [size.sum(1, keepdim=True) for size in sizes]
        factor = 1
    else:
        totals = [torch.cat(sizes, dim=1).sum(1, keepdim=True)] * len(sizes)
        factor = len(sizes)
    return [
        torch.where(total > 0, factor * (size / torch.where(total > 0, total, 1.0)), even)
        for size, total, even in zip(sizes, totals, uniform)
    ]


def fuse_heads(attention: Tensor, how: str = "mean", weights: Tensor | None = None) -> Tensor:
    """One matrix per block: ``Ā = Σ_h w_h A_h`` with weights, else the mean, maximum or minimum over heads.

    Args:
        attention: (B, H, n, n).
        how: "mean", "max" or "min"; not looked at when weights are given.
        weights: (B, H).

    Returns: (B, n, n).
    """
    if weights is not None:
        return (attention * weights[:, :, None, None]).sum(1)
    if how == "mean":
        return attention.mean(1)
    if how in ("max", "min"):
        return attention.amax(1) if how == "max" else attention.amin(1)
    raise unknown("head fusion", how, FUSIONS, "vitkit show rollout")


def discard_weakest(fused: Tensor, ratio: float, num_prefix: int) -> Tensor:
    """Zero the weakest ``ratio`` of an image's attention entries; what goes to prefix tokens always stays.

    Args:
        fused: (B, n, n).
        ratio: share of entries to drop, in [0, 1).
        num_prefix: P.
    """
    if not 0 <= ratio < 1:
        raise BadInput(f"discard_ratio={ratio} must lie in [0, 1).")
    flat = fused.flatten(1)
    num_dropped = int(flat.shape[1] * ratio)
    if num_dropped == 0:
        return fused
    weakest = flat.sort(dim=1, stable=True).indices[:, :num_dropped]
    kept = torch.ones_like(flat).scatter(1, weakest, 0.0).reshape(fused.shape)
    kept[:, :, :num_prefix] = 1.0
    return fused * kept


def transition(fused: Tensor, add_residual: bool = True) -> Tensor:
    """``Â = rownorm(Ā + I)``: how a block passes tokens on; every row sums to 1.

    A row without anything in it (all its attention was discarded) passes its own token on.
    """
    eye = torch.eye(fused.shape[-1], device=fused.device, dtype=fused.dtype)
    mixed = fused + eye if add_residual else fused
    total = mixed.sum(-1, keepdim=True)
    return torch.where(total > 0, mixed / torch.where(total > 0, total, 1.0), eye)


def compose(transitions: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> Tensor:
    """``R = Â_L … Â_1`` over the original tokens.

    Where tokens merged between two blocks, the new row is the mean of the original patches it stands for, exactly as
    merging averages their streams; a dropped patch reaches nobody any more.

    Args:
        transitions: per block (B, n_l, n_l), rows summing to 1.
        layouts: per block.

    Returns: (B, n_L, T) what every row of the last block is made of; rows sum to 1.
    """
    first = layouts[0]
    batch, device = transitions[0].shape[0], transitions[0].device
    total = first.num_prefix + first.num_original
    flow = torch.eye(total, device=device, dtype=transitions[0].dtype).expand(batch, -1, -1)
    before: TokenLayout | None = None
    for step, layout in zip(transitions, layouts):
        if layout.num_prefix != first.num_prefix:
            raise BadInput(
                f"the number of prefix tokens changes from {first.num_prefix} to {layout.num_prefix} between blocks; "
                "attention rollout needs one set of them (take deep prompts out first)."
            )
        if before is None or layout.source is not before.source:
            flow = _regroup(flow, before, layout, step.shape[-1] - layout.num_prefix)
        flow = step @ flow
        before = layout
    return flow


def read_map(rows: Tensor, layout: TokenLayout, reads_class: bool) -> Tensor:
    """Row of the class token, or the mean over the patch rows when the model does not read one.

    Args:
        rows: (B, …, n, T) flow from original tokens to the rows of the last block.
        layout: of the last block.
        reads_class: True takes the class token's row.

    Returns: (B, …, *grid) scores of the original patches, prefix tokens dropped.
    """
    num_prefix = layout.num_prefix
    if reads_class:
        row = rows[..., layout.prefix_slice("class").start, :]
    else:
        weight = _patch_counts(layout, rows.shape[0], rows.shape[-2] - num_prefix, rows.device)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
        weight = weight.reshape(weight.shape[0], *[1] * (rows.ndim - 3), weight.shape[1], 1)
        row = (rows[..., num_prefix:, :] * weight).sum(-2)
    patches = row[..., num_prefix:]
    return patches.reshape(*patches.shape[:-1], *layout.grid)


def attention_rollout(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    head_fusion: str = "mean",
    scope: str = "layer",
    discard_ratio: float = 0.0,
    add_residual: bool = True,
    chunk: int = 32,
) -> Explanation:
    """The one implementation behind :func:`~vitkit.explain.rollout.rollout` and :func:`~vitkit.explain.gmar.gmar`.

    Args: as there; ``scope`` matters for the gradient-weighted fusions only.
    """
    if head_fusion not in FUSIONS:
        raise unknown("head fusion", head_fusion, FUSIONS, "vitkit show rollout")
    weighted = head_fusion.startswith("gmar_")

    def explain(part: Tensor, chosen: Tensor | int | None) -> Explanation:
        seen = trace_attention(model, part, chosen, grad=weighted)
        for i, attention in enumerate(seen.weights):
            if bool((attention < 0).any()):
                raise BadInput(
                    f"blocks.{i} attends with negative weights, which are no shares of a flow; rollout is not defined "
                    "on them. Use grad-cam for this model."
                )
        per_block: list[Tensor] | list[None] = [None] * len(seen.weights)
        if weighted:
            per_block = head_weights(seen.grads, head_fusion.removeprefix("gmar_"), scope)
        steps = []
        for attention, weights, layout in zip(seen.weights, per_block, seen.layouts):
            fused = fuse_heads(attention, head_fusion, weights)
            steps.append(transition(discard_weakest(fused, discard_ratio, layout.num_prefix), add_residual))
        last = seen.layouts[-1]
        meta = {"head_fusion": head_fusion, "discard_ratio": discard_ratio, "add_residual": add_residual}
        if weighted:
            meta |= {"scope": scope, "head_weights": per_block}
        return Explanation(read_map(compose(steps, seen.layouts), last, seen.reads_class), seen.target, meta=meta)

    return in_chunks(explain, images, target, chunk)


def _num_rows(layout: TokenLayout) -> int:
    for tensor in (layout.sizes, layout.valid):
        if tensor is not None:
            return tensor.shape[1]
    return layout.num_original if layout.coords is None else layout.coords.shape[-2]


def _patch_counts(layout: TokenLayout, batch: int, num_rows: int, device: torch.device) -> Tensor:
    """(B, N) how many original patches each row stands for; ``sizes`` may have been left out of the layout."""
    source = layout.source_indices(batch, device)
    counts = torch.zeros(batch, num_rows, device=device)
    return counts.scatter_add_(1, source.clamp(min=0), (source >= 0).to(counts.dtype))


def _regroup(flow: Tensor, before: TokenLayout | None, layout: TokenLayout, num_rows: int) -> Tensor:
    """Rows of the flow for the tokens of ``layout``: the mean over the original patches each one stands for."""
    num_prefix, batch = layout.num_prefix, flow.shape[0]
    if before is None and layout.source is None:
        if num_rows != layout.num_original:
            raise BadInput(
                f"the first block has {num_rows} patch tokens for a grid of {layout.num_original} and does not say "
                "which is which (packed or multi-scale tokens); attention rollout needs the plain grid."
            )
        return flow
    patches = flow[:, num_prefix:]
    if before is not None:
        patches = before.unmerge(patches)
    index = layout.source_indices(batch, flow.device)
    kept = (index >= 0).to(flow.dtype)
    grouped = torch.zeros(batch, num_rows, flow.shape[-1], device=flow.device, dtype=flow.dtype)
    to = index.clamp(min=0).unsqueeze(-1).expand(-1, -1, flow.shape[-1])
    grouped.scatter_add_(1, to, patches * kept.unsqueeze(-1))
    counts = _patch_counts(layout, batch, num_rows, flow.device)
    return torch.cat([flow[:, :num_prefix], grouped / counts.clamp(min=1).unsqueeze(-1)], dim=1)


def unit_vectors(layout: TokenLayout, batch: int, num_rows: int, device: torch.device) -> Tensor:
    """(B, n, T): what each row of a block stands for before anything attended, its share of the original patches."""
    total = layout.num_prefix + layout.num_original
    eye = torch.eye(total, device=device).expand(batch, -1, -1)
    return _regroup(eye, None, layout, num_rows)


__all__ = [
    "FUSIONS",
    "SCOPES",
    "Attentions",
    "attention_rollout",
    "compose",
    "discard_weakest",
    "fuse_heads",
    "head_weights",
    "read_map",
    "trace_attention",
    "transition",
    "unit_vectors",
]
