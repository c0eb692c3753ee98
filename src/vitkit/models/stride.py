"""The smallest images a network makes sense of."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

# a columnar network with fewer tokens than 4×4 has nothing to attend to
_LEAST_TOKENS = 4


def network_size(base: str, options: dict[str, Any], image_size: tuple[int, int]) -> tuple[int, int] | None:
    """The size images must be enlarged to for a network, or None where their own will do.

    A pyramid needs a last map of at least 1×1, so sides of at least its whole stride; a plain ViT (one stride only)
    needs sides that are multiples of its patch, and 4×4 patches. The aspect is kept as far as the multiples allow.

    >>> [network_size("resnet18", {}, (side, side)) for side in (8, 28, 64)]
    [(32, 32), (56, 56), None]
    >>> network_size("vit_tiny_patch16_224", {}, (28, 28)), network_size("vit_tiny_patch16_224", {}, (100, 64))
    ((64, 64), (112, 64))

    Args:
        base: a timm name.
        options: what it is made with; ``img_size``, ``in_chans`` and ``num_classes`` play no role.
        image_size: (H, W).
    """
    relevant = {k: v for k, v in options.items() if k not in ("img_size", "in_chans", "num_classes")}
    relevant_items = tuple(sorted((k, _hashable(v)) for k, v in relevant.items()))
    # some networks choose their patch by the size; others cannot even be made at a size that is too small
    strides = _strides(base, (*relevant_items, ("img_size", image_size))) or _strides(base, relevant_items)
    if not strides:
        return None
    h, w = image_size
    last = strides[-1]
    if len(set(strides)) == 1:
        grow = max(1.0, _LEAST_TOKENS * last / min(h, w))
        needed = tuple(-(-round(side * grow) // last) * last for side in image_size)
    else:
        times = -(-last // min(h, w))
        needed = (h * times, w * times)
    return None if needed == (h, w) else (needed[0], needed[1])


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, (list, tuple)) else value


@lru_cache(maxsize=256)
def _strides(base: str, options: tuple[tuple[str, Any], ...]) -> tuple[int, ...]:
    """How much each feature map of the network is smaller than the image; () where it does not say."""
    import timm

    from vitkit.models.backbones import register

    register()
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = timm.create_model(base, num_classes=0, **dict(options))
    except Exception:
        # what is wrong with the name or the options is said where the model is made
        return ()
    info = getattr(model, "feature_info", None) or []
    reductions = [entry.get("reduction") if isinstance(entry, dict) else None for entry in info]
    return tuple(int(r) for r in reductions if r)
