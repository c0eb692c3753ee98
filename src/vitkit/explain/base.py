"""What every explainer returns, and the few steps all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown

# B batch · gh×gw patch grid · H heads


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where a model looked for one output per image.

    Attributes:
        map: (B, gh, gw) raw patch scores, float32; only their order and ratios mean something.
        target: (B,) the output each map is about.
        per_head: (B, H, gh, gw) where a method has one map per head, else None.
        meta: what the method did: options, head weights, the layer it read.
    """

    map: Tensor
    target: Tensor
    per_head: Tensor | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def pixel_map(self, size: int | tuple[int, int]) -> Tensor:
        """The map at pixel resolution by bilinear interpolation.

        Args:
            size: (height, width) in pixels, or one side.

        Returns: (B, height, width).
        """
        return to_pixels(self.map, size)


def to_pixels(patch_map: Tensor, size: int | tuple[int, int]) -> Tensor:
    """(B, gh, gw) → (B, height, width), bilinear.

    Raises: BadInput if the map is not two-dimensional per image (a video's is not).
    """
    if patch_map.ndim != 3:
        raise BadInput(f"a patch map must be (B, gh, gw); this one is {tuple(patch_map.shape)}.")
    height, width = (size, size) if isinstance(size, int) else size
    grown = F.interpolate(patch_map.float().unsqueeze(1), size=(height, width), mode="bilinear", align_corners=False)
    return grown.squeeze(1)


def at_places(patch_map: Tensor) -> Tensor:
    """A map that has dates or bands as well, (B, …, gh, gw), summed over them: (B, gh, gw).

    >>> at_places(torch.ones(1, 3, 2, 2))
    tensor([[[3., 3.],
             [3., 3.]]])
    """
    return patch_map.flatten(1, -3).sum(1) if patch_map.ndim > 3 else patch_map


def normalize(patch_map: Tensor, how: str = "minmax") -> Tensor:
    """Bring each map of a batch to one scale.

    ``"minmax"``: ``(m − min) / (max − min)``, a constant map gives zeros. ``"sum"``: ``m / Σ m`` after negative scores
    were set to 0; a map without any positive score becomes uniform.

    >>> normalize(torch.tensor([[[1.0, 3.0]]])), normalize(torch.tensor([[[1.0, 3.0]]]), "sum")
    (tensor([[[0., 1.]]]), tensor([[[0.2500, 0.7500]]]))

    Args:
        patch_map: (B, …) scores of patches or pixels.
        how: "minmax" or "sum".

    Raises: UnknownName for another ``how``.
    """
    flat = patch_map.flatten(1)
    if how == "minmax":
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        span = high - low
        out = torch.where(span > 0, (flat - low) / torch.where(span > 0, span, 1.0), torch.zeros_like(flat))
    elif how == "sum":
        positive = flat.clamp(min=0)
        total = positive.sum(1, keepdim=True)
        uniform = torch.full_like(flat, 1 / flat.shape[1])
        out = torch.where(total > 0, positive / torch.where(total > 0, total, 1.0), uniform)
    else:
        raise unknown("normalisation", how, ("minmax", "sum"), "vitkit.explain.normalize")
    return out.reshape(patch_map.shape)


def resolve_target(logits: Tensor, target: Tensor | int | None) -> Tensor:
    """The output each image is explained for: the predicted one unless given.

    Args:
        logits: (B, K).
        target: (B,) integers, one integer for all images, or None.

    Raises: BadInput if there is not one valid output index per image.
    """
    if logits.ndim != 2:
        raise BadInput(f"explainers need a model with logits (B, K); this one gave {tuple(logits.shape)}.")
    if target is None:
        return logits.argmax(-1)
    batch, outputs = logits.shape
    chosen = torch.as_tensor(target, device=logits.device)
    if chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise BadInput(f"target holds output indices; it is {chosen.dtype}, use integers.")
    chosen = chosen.long().expand(batch) if chosen.ndim == 0 else chosen.long()
    if chosen.shape != (batch,):
        raise BadInput(f"target must be one index per image, ({batch},); it is {tuple(chosen.shape)}.")
    if batch and not bool(((chosen >= 0) & (chosen < outputs)).all()):
        raise BadInput(f"target must lie in 0…{outputs - 1}; it holds {int(chosen.min())}…{int(chosen.max())}.")
    return chosen


def for_model(model: nn.Module, images: Tensor) -> Tensor:
    """Images on the model's device in its floating-point type."""
    if images.ndim != 4:
        raise BadInput(f"images must be (B, C, H, W); these are {tuple(images.shape)}.")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return images if parameter is None else images.to(parameter.device, parameter.dtype)


@contextmanager
def differentiable() -> Iterator[None]:
    """Allow a backward inside, also when the caller is under ``no_grad`` or ``inference_mode``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def in_chunks(
    explain: Callable[[Tensor, Tensor | None], Explanation], images: Tensor, target: Tensor | int | None, chunk: int
) -> Explanation:
    """Explain a batch of any length ``chunk`` images at a time; attention matrices of all at once would not fit.

    Args:
        explain: ``f(images, target) -> Explanation`` of one piece.
        images: (B, C, H, W).
        target: for all images, cut along.
        chunk: images at a time, at least 1.

    Raises: BadInput if there is no image, ``chunk`` is not positive or ``target`` does not fit the images.
    """
    if chunk < 1 or images.ndim != 4 or not len(images):
        raise BadInput(
            f"got images of shape {tuple(images.shape)} in chunks of {chunk}; give at least one image (B, C, H, W) "
            "and a positive chunk."
        )
    with torch.inference_mode(False):
        # tensors made under inference_mode may not enter a graph; copies made outside it may
        images = images.clone() if images.is_inference() else images
        whole = None if target is None else torch.as_tensor(target).clone()
    if whole is not None and whole.ndim and whole.shape != (len(images),):
        raise BadInput(f"target must be one index per image, ({len(images)},); it is {tuple(whole.shape)}.")
    pieces = []
    for start in range(0, len(images), chunk):
        part = whole[start : start + chunk] if whole is not None and whole.ndim else whole
        pieces.append(explain(images[start : start + chunk], part))
    if len(pieces) == 1:
        return pieces[0]
    heads = [p.per_head for p in pieces if p.per_head is not None]
    return Explanation(
        map=torch.cat([p.map for p in pieces]),
        target=torch.cat([p.target for p in pieces]),
        per_head=torch.cat(heads) if heads else None,
        meta={k: _join([p.meta[k] for p in pieces]) for k in pieces[0].meta},
    )


def _join(values: list[Any]) -> Any:
    """Facts of pieces: lists of per-image tensors are joined, everything else is the same in all of them."""
    first = values[0]
    if isinstance(first, list) and first and isinstance(first[0], Tensor):
        return [torch.cat(parts) for parts in zip(*values)]
    return first
