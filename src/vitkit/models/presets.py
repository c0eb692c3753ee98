"""Small hosts for small images, registered with timm beside its own names."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model

from vitkit.models.backbones.contract import cfg, create
from vitkit.models.vit import ViT

# width, depth, heads: sized so that a 2-core machine trains the smallest in seconds an epoch on 1,000 small images
SIZES = {
    "vit_femto": (64, 4, 4),
    "vit_pico": (96, 4, 4),
    "vit_nano": (128, 6, 4),
    "vit_micro": (160, 8, 5),
}

default_cfgs = generate_default_cfgs(
    {
        name: cfg(
            input_size=(3, 32, 32), pool_size=None, mean=(0.5,) * 3, std=(0.5,) * 3, first_conv="patch_embed.proj"
        )
        for name in SIZES
    }
)


def default_patch(image_size: int | tuple[int, int]) -> int:
    """Patch side in pixels that gives a small image a useful number of tokens (16 to 256)."""
    side = min(image_size) if isinstance(image_size, tuple) else image_size
    return next((patch for limit, patch in ((16, 2), (48, 4), (96, 8)) if side <= limit), 16)


def small_vit(size: str, **kwargs: Any) -> ViT:
    """A preset of :data:`SIZES`; timm's constructor arguments override it."""
    dim, depth, heads = SIZES[size]
    img_size = kwargs.setdefault("img_size", 32)
    defaults: dict[str, Any] = {
        "patch_size": default_patch(img_size),
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": 2.0,
        # Xavier matrices: the usual normal(0, 0.02) start learns several times slower at these widths
        "weight_init": "jax",
    }
    return ViT(**{**defaults, **kwargs})


@register_model
def vit_femto(pretrained: bool = False, **kwargs: Any) -> ViT:
    """64 wide, 4 blocks; patch 2, 4, 8 or 16 by image size."""
    return _create("vit_femto", pretrained, kwargs)


@register_model
def vit_pico(pretrained: bool = False, **kwargs: Any) -> ViT:
    """96 wide, 4 blocks; patch 2, 4, 8 or 16 by image size."""
    return _create("vit_pico", pretrained, kwargs)


@register_model
def vit_nano(pretrained: bool = False, **kwargs: Any) -> ViT:
    """128 wide, 6 blocks; patch 2, 4, 8 or 16 by image size."""
    return _create("vit_nano", pretrained, kwargs)


@register_model
def vit_micro(pretrained: bool = False, **kwargs: Any) -> ViT:
    """160 wide, 8 blocks; patch 2, 4, 8 or 16 by image size."""
    return _create("vit_micro", pretrained, kwargs)


def _create(size: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    return create(partial(small_vit, size), size, pretrained, {}, kwargs, out_indices=3)
