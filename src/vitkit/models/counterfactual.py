"""What a vision transformer answers to the background alone, and its logits without that."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.layout import Tap, TokenLayout
from vitkit.models.vit import Attention, ViT

# B batch · H heads · P prefix tokens · N patches of the grid · D width · K classes


class Watched(NamedTuple):
    """One pass through the blocks.

    Attributes:
        logits: (B, K). tokens: (B, P+N', D) after the last block, and their layout.
        share: (B, N) attention that every patch gets, non-negative, rows sum to 1.
    """

    logits: Tensor
    tokens: Tensor
    layout: TokenLayout
    share: Tensor


class Counterfactual(nn.Module):
    """``z − γ z_cf``: logits of a ViT minus what it answers to the background alone, in eval mode.

    The foreground are the most attended patches of the image (:func:`foreground`); they are dropped for the second
    pass. With γ = 0, in training, and where all is foreground there is no second pass or no correction.

    Args:
        vit: the host; parameters are its own. gamma: γ ≥ 0. mass: of the attention that makes the foreground.

    Shape: (B, C, H, W) → (B, K).
    Raises: BadInput for a negative γ, or a host without attention weights.
    """

    def __init__(self, vit: ViT, gamma: float, mass: float = 0.6) -> None:
        super().__init__()
        if gamma < 0:
            raise BadInput(f"gamma={gamma} must be 0 or more.")
        self.vit = vit
        self.gamma, self.mass = float(gamma), float(mass)
        attention_block(vit)
        self.training = vit.training

    def forward(self, images: Tensor, **cond: Any) -> Tensor:
        if self.training or not self.gamma:
            return self.vit(images, **cond)
        x, layout = self.vit.embed(images, **cond)
        logits, background = both_logits(self.vit, x, layout, self.mass)
        return logits - self.gamma * background

    def extra_repr(self) -> str:
        return f"gamma={self.gamma:.4g}, mass={self.mass}"


def both_logits(vit: ViT, x: Tensor, layout: TokenLayout, mass: float) -> tuple[Tensor, Tensor]:
    """Logits of embedded tokens and of their background alone, (B, K) each; the latter 0 where there is none."""
    seen = watch(vit, x, layout)
    return seen.logits, background_logits(vit, x, layout, foreground(seen.share, mass))


def background_logits(vit: ViT, x: Tensor, layout: TokenLayout, fg: Tensor) -> Tensor:
    """Logits (B, K) without the patches ``fg`` (B, N); 0 for images that have no others."""
    layout.require_full_grid("A pass through the background alone")
    # rows that are not valid are neither keys nor pooled, so they are as good as dropped, however many an image has
    rest = layout.replace(valid=~fg, tap=None, aux={})
    return run(vit, x, rest)[0] * (~fg).any(1, keepdim=True)


def foreground(share: Tensor, mass: float) -> Tensor:
    """The fewest patches that together get at least ``mass`` of the attention.

    >>> foreground(torch.tensor([[0.2, 0.5, 0.1, 0.2]]), 0.6)
    tensor([[ True,  True, False, False]])

    Args:
        share: (B, N), rows sum to 1. mass: in (0, 1]; 1 takes all.

    Returns: (B, N) bool, at least one patch an image.
    """
    if mass >= 1:
        return torch.ones_like(share, dtype=torch.bool)
    ordered, index = share.float().sort(dim=1, descending=True, stable=True)
    chosen = ordered.cumsum(1) - ordered < mass
    return torch.zeros_like(chosen).scatter(1, index, chosen)


def watch(vit: ViT, x: Tensor, layout: TokenLayout) -> Watched:
    """Run embedded tokens through the host and see what its last attention attends to.

    That is the class token's attention, mean of the heads; without a class token the mean over all patches.
    """
    eye = _Eye(layout.tap, attention_block(vit))
    logits, tokens, after = run(vit, x, layout.replace(tap=eye))
    if eye.share is None:
        raise BadInput(
            f"Block {eye.depth} gave no attention weights, which tell foreground from background; use a model whose "
            "last blocks keep standard attention."
        )
    return Watched(logits, tokens, after, eye.share)


def run(vit: ViT, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor, TokenLayout]:
    """Embedded tokens → logits, tokens after the last block, their layout."""
    wants = vit.read_out is not None and getattr(vit.read_out, "wants_states", False)
    states: list[tuple[Tensor, TokenLayout]] | None = [] if wants else None
    tokens, after = vit.run(x, layout, states)
    return vit.readout(tokens, after, states), tokens, after


def attention_block(vit: ViT) -> int:
    """The last block with attention weights.

    Raises: BadInput if there is none.
    """
    found = [i for i, block in enumerate(vit.blocks) if isinstance(getattr(block, "attn", None), Attention)]
    if not found:
        kinds = sorted({type(getattr(block, "attn", block)).__name__ for block in vit.blocks})
        raise BadInput(
            f"Attention weights tell foreground from background, and the mixers of this model ({', '.join(kinds)}) "
            "have none; keep standard attention in at least one block."
        )
    return found[-1]


class _Eye:
    """A tap beside the one that may be there: keeps what the patches get in one block."""

    def __init__(self, inner: Tap | None, depth: int) -> None:
        self.inner, self.depth = inner, depth
        self.share: Tensor | None = None

    def wants(self, site: str, depth: int | None) -> bool:
        mine = site == "attn.weights" and depth == self.depth
        return mine or (self.inner is not None and self.inner.wants(site, depth))

    def __call__(self, site: str, value: Tensor, depth: int | None, layout: TokenLayout) -> Tensor:
        if self.inner is not None and self.inner.wants(site, depth):
            value = self.inner(site, value, depth, layout)
        if site == "attn.weights" and depth == self.depth:
            self.share = _share(value.detach().float(), layout)
        return value


def _share(weights: Tensor, layout: TokenLayout) -> Tensor:
    """(B, H, P+N', P+N') → (B, N): a merged row's attention is spread over the patches it holds."""
    prefix = layout.num_prefix
    if any(name == "class" for name, _ in layout.prefix):
        row = weights[:, :, layout.prefix_slice("class").start, prefix:].mean(1)
    else:
        row = weights[:, :, prefix:, prefix:].mean((1, 2))
    row = row.clamp(min=0)
    if layout.sizes is not None:
        row = row / layout.sizes.clamp(min=1e-6)
    patches = layout.unmerge(row)
    return patches / patches.sum(1, keepdim=True).clamp(min=1e-12)
