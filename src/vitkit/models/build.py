"""One call from a name to a model with the chosen parts in its slots."""

from __future__ import annotations

from typing import Any

import timm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitkit.errors import BadInput, VitkitError, unknown
from vitkit.models.backbones import register
from vitkit.models.rehost import rehost
from vitkit.models.swap import _ALIASES, SLOTS, swap


def build(name: str = "vit_pico", *, pretrained: bool = False, **options: Any) -> nn.Module:
    """Build a model by name and fill its slots.

    >>> model = build("vit_pico", img_size=8, in_chans=1, num_classes=10)
    >>> type(model).__name__, model.patch_embed.grid_size
    ('ViT', (4, 4))

    Args:
        name: a preset (``vit_femto``, ``vit_pico``, ``vit_nano``, ``vit_micro``) or any timm model name; plain ViTs
            and rotary ones (EVA-02, DINOv3, …) are re-hosted.
        pretrained: load timm's pretrained weights (needs the network or a cache).
        options: slot names (``mixer="…"``, ``normalizer=("sinkhorn", {"steps": 3})``; several parts for one slot as a
            list), everything else goes to timm's constructor (``num_classes``, ``img_size``, ``in_chans``, …).

    Returns: a :class:`~vitkit.models.vit.ViT` for plain and rotary ViTs, else timm's model; ``model.swaps`` lists the
        swaps.

    Raises:
        UnknownName: no such model, slot or part. BadInput: slots asked of a model that is not a plain ViT, an image
            size that is no whole number of patches, or sizes that timm refuses.
    """
    slots = {k: options.pop(k) for k in list(options) if k in SLOTS or k in _ALIASES}
    model = create(name, pretrained=pretrained, **options)
    records = [
        swap(model, slot, part, **part_options)
        for slot, value in slots.items()
        if value is not None
        for part, part_options in as_parts(value)
    ]
    model.swaps = records  # type: ignore[assignment]
    return model


def check_name(name: str) -> None:
    """Raises: UnknownName for what timm has no network of, with the nearest name it has."""
    register()
    if not timm.is_model(name.split(".")[0]):
        raise unknown("model", name, timm.list_models(), "timm.list_models()")


def create(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """A timm model by name; a plain or rotary ViT comes back re-hosted (same tensors, checked)."""
    check_name(name)
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        if "img_size" in options and "img_size" in str(error):
            # convolutional networks take any size and have no such argument
            model = timm.create_model(
                name, pretrained=pretrained, **{k: v for k, v in options.items() if k != "img_size"}
            )
        else:
            raise BadInput(f"Cannot create {name!r}: {error}.") from error
    except AssertionError as error:
        # timm checks some sizes by assertions that name no value
        raise BadInput(f"Cannot create {name!r}: {error}.{_divisors(options, error)}") from error
    except (OSError, RuntimeError) as error:
        if pretrained:
            raise VitkitError(
                f"The pretrained weights of {name!r} could not be loaded ({error}). Without a network, pass a local "
                "file with checkpoint_path=…, or use pretrained=False."
            ) from error
        raise
    if not isinstance(model, (VisionTransformer, Eva)):
        return model
    if options.get("img_size") is not None:
        _require_whole_patches(name, model)
    try:
        return rehost(model)
    except BadInput:
        # a variant with a forward pass of its own (post-norm, parallel blocks, two heads) stays what it is
        return model


def _divisors(options: dict[str, Any], error: AssertionError) -> str:
    """Numbers of heads that would do, where that is what timm stumbled over."""
    heads, dim = options.get("num_heads"), options.get("embed_dim")
    if not isinstance(heads, int) or "num_heads" not in str(error):
        return ""
    if not isinstance(dim, int):
        return f" num_heads={heads} must divide the width; leave it out, or give embed_dim={64 * heads} too."
    return f" num_heads={heads} must divide embed_dim={dim}: {[h for h in range(1, 33) if dim % h == 0]} do."


def _require_whole_patches(name: str, model: Any) -> None:
    """timm cuts off the pixels of a last patch that is not whole, and says nothing."""
    embed = model.patch_embed
    size, patch = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    if size is None or patch is None or getattr(embed, "dynamic_img_pad", False):
        return
    if any(side % p for side, p in zip(size, patch)):
        fits = " or ".join(
            "×".join(str((side // p + more) * p) for side, p in zip(size, patch))
            for more in (0, 1)
            if more or all(side >= p for side, p in zip(size, patch))
        )
        raise BadInput(
            f"img_size={size[0]}×{size[1]} of {name!r} is not a whole number of {patch[0]}×{patch[1]} patches; use "
            f"{fits}, another patch_size, or dynamic_img_pad=True."
        )


def as_parts(value: Any) -> list[tuple[Any, dict[str, Any]]]:
    """What may be written for a slot (a part, ``(part, options)``, ``{"name": …}``, several in a list) as pairs."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
        return [(value[0], value[1])]
    if isinstance(value, list):
        return [pair for item in value for pair in as_parts(item)]
    if isinstance(value, dict):
        rest = dict(value)
        return [(rest.pop("name"), rest)]
    return [(value, {})]
