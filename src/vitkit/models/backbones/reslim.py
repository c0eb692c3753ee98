"""Reslim's encoder: a slim ViT on fields of many variables, with one token per place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitkit.errors import BadInput, unknown
from vitkit.models.backbones.contract import cfg, create
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.tokenizers.variable_tokens import VariableTokens
from vitkit.models.presets import default_patch
from vitkit.models.vit import ViT, _Taps

__all__ = ["ReslimEncoder"]

# B batch · V variables · H×W cells of a field · N patches · D width

SIZES: dict[str, dict[str, Any]] = {
    # Xavier matrices: the usual normal(0, 0.02) start learns several times slower at this width
    "femto": {"embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0, "weight_init": "jax"},
    "8m": {"embed_dim": 256, "depth": 6, "num_heads": 4},
    "117m": {"embed_dim": 1024, "depth": 8, "num_heads": 16},
    "1b": {"embed_dim": 3072, "depth": 8, "num_heads": 24},
    "10b": {"embed_dim": 8192, "depth": 11, "num_heads": 32},
}


class ReslimEncoder(ViT):
    """The host without class token on fields: :class:`VariableTokens`, fixed sine–cosine positions, the resolution.

    ``x_n = Attention(query, {E_v patch_n + e_v}_v) + pos_n + W r + b`` with r the size of a cell in km, then pre-norm
    blocks and a layer norm. Channels are variables; every call may bring a subset of them:
    ``encoder(fields, variables=["t2m", "orography"], resolution=111.0)``. As it is a host, parts, explainers and
    transforms work on it. For timm it is a classifier over the mean of the tokens, to which the plain call belongs.

    Args:
        img_size: (H, W) of the fields that positions are laid out for; they are resampled for others.
        in_chans: V, the length of ``variables`` if these are named. num_classes, embed_dim, depth, num_heads,
            mlp_ratio and the others: as in timm's ViT; ``class_token=True`` adds one.
        patch_size: p.
        variables: names of the channels; None: "0", "1", …
        learn_positions: train the position table, too.

    Shape: (B, V, H, W) → (B, num_classes); ``resolution`` is a number or (B,), None counts as 0.
    Raises: BadInput if names repeat, are not as many as channels or unknown, or ``resolution`` has another shape.
    Paper: ORBIT-2: Scaling Exascale Vision Foundation Models for Weather and Climate Downscaling, arXiv:2505.04802.
    Departs from the paper: see :class:`VariableTokens`; classification and the small size are ours. The position
        table is resampled with anti-aliasing. Encoder names against the paper's sizes of the whole network:
        ``reslim_tiny`` 8M, ``reslim_small`` 117M, ``reslim_base`` 1B, ``reslim_large`` 10B.
    """

    def __init__(
        self,
        *args: Any,
        img_size: int | tuple[int, int] = (32, 64),
        in_chans: int = 3,
        patch_size: int | tuple[int, int] = 2,
        variables: Sequence[str] | None = None,
        learn_positions: bool = False,
        **kwargs: Any,
    ) -> None:
        names = tuple(str(i) for i in range(in_chans)) if variables is None else tuple(variables)
        if len(set(names)) != len(names) or len(names) != in_chans:
            raise BadInput(
                f"Reslim needs one name for each of its in_chans={in_chans} channels and none twice; got {list(names)}."
            )
        width = kwargs.get("embed_dim", 768)
        if width % 4:
            raise BadInput(f"embed_dim={width} of Reslim must be a multiple of 4 for its positions; {width // 4 * 4}?")
        kwargs = {"class_token": False, "global_pool": "avg", "fc_norm": False, **kwargs}
        super().__init__(*args, img_size=img_size, patch_size=patch_size, in_chans=in_chans, **kwargs)
        self.variables = names
        self.patch_embed = VariableTokens(
            self.embed_dim,
            kwargs.get("num_heads", 12),
            to_2tuple(patch_size),
            to_2tuple(img_size),
            in_chans,
            kwargs.get("dynamic_img_pad", False),
        )
        self.resolution_embed = nn.Linear(1, self.embed_dim)
        nn.init.trunc_normal_(self.resolution_embed.weight, std=0.02)
        nn.init.zeros_(self.resolution_embed.bias)
        if self.pos_embed is not None:
            table = build_sincos2d_pos_embed(list(self.patch_embed.grid_size), self.embed_dim)
            with torch.no_grad():
                self.pos_embed[:, -len(table) :].copy_(table)
            self.pos_embed.requires_grad_(learn_positions)

    def numbers(self, variables: Sequence[str]) -> list[int]:
        """Where the variables of these names stand among the encoder's."""
        for name in variables:
            if name not in self.variables:
                raise unknown("variable", name, self.variables, "model.variables")
        if len(set(variables)) != len(variables) or not variables:
            raise BadInput(f"variables={list(variables)} must name at least one variable, and none twice.")
        return [self.variables.index(name) for name in variables]

    def embed(self, images: Tensor, **cond: Any) -> tuple[Tensor, TokenLayout]:
        """Fields (B, V, H, W), or (B, V', H, W) of the ``variables`` named, → tokens and their layout."""
        names = cond.get("variables")
        if names is None or tuple(names) == self.variables:
            return super().embed(images, **cond)
        tokenizer, chosen = self.patch_embed, self.numbers(names)
        if not isinstance(tokenizer, VariableTokens):
            raise BadInput(
                f"{type(tokenizer).__name__} knows no variables by name; call the encoder with all {self.in_chans}."
            )
        # from here on as in the host, whose own embed hands a tokenizer nothing but images
        x, layout = tokenizer(images, chosen)
        tap = _Taps(self.taps) if self.taps else None
        aux = self.aux_sink if self.aux_sink is not None else {}
        layout = layout.replace(prefix=self._prefix_groups(), cond=cond, tap=tap, aux=aux)
        x = self._add_positions(x, layout)
        if self.position is not None:
            x = self.position.embed(x, layout, images)
        x, layout = self._drop_patches(self.pos_drop(x), layout)
        x = self.norm_pre(x)
        return (x if tap is None else tap("embed", x, None, layout)), layout

    def _add_positions(self, x: Tensor, layout: TokenLayout) -> Tensor:
        x = super()._add_positions(x, layout)
        given = layout.cond.get("resolution")
        resolution = torch.as_tensor(0.0 if given is None else given, dtype=x.dtype, device=x.device).reshape(-1)
        if len(resolution) not in (1, x.shape[0]):
            raise BadInput(
                f"resolution has {len(resolution)} values for {len(x)} fields; give one number in km, or one for each."
            )
        return x + self.resolution_embed(resolution[:, None, None])

    def no_weight_decay(self) -> set[str]:
        return set(super().no_weight_decay()) | {"patch_embed.query", "patch_embed.variable_embed"}


_FIELD = {"input_size": (3, 32, 64), "mean": (0.0,) * 3, "std": (1.0,) * 3, "pool_size": None, "first_conv": ()}
default_cfgs = generate_default_cfgs(
    {
        "reslim_femto": cfg(**(_FIELD | {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3})),
        "reslim_tiny": cfg(**_FIELD),
        "reslim_small": cfg(**_FIELD),
        "reslim_base": cfg(**_FIELD),
        "reslim_large": cfg(**_FIELD),
    }
)


@register_model
def reslim_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels: 64 wide, 4 blocks; patch 2, 4, 8 or 16 by image size."""
    patch = default_patch(to_2tuple(kwargs.get("img_size") or 32))
    return _create("reslim_femto", pretrained, {"img_size": 32, "patch_size": patch, **SIZES["femto"]}, kwargs)


@register_model
def reslim_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """Encoder of the paper's 8M: 256 wide, 6 blocks, patches of 2 cells."""
    return _create("reslim_tiny", pretrained, SIZES["8m"], kwargs)


@register_model
def reslim_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """Encoder of the paper's 117M: 1,024 wide, 8 blocks, patches of 2 cells."""
    return _create("reslim_small", pretrained, SIZES["117m"], kwargs)


@register_model
def reslim_base(pretrained: bool = False, **kwargs: Any) -> Any:
    """Encoder of the paper's 1B: 3,072 wide, 8 blocks, patches of 2 cells."""
    return _create("reslim_base", pretrained, SIZES["1b"], kwargs)


@register_model
def reslim_large(pretrained: bool = False, **kwargs: Any) -> Any:
    """Encoder of the paper's 10B: 8,192 wide, 11 blocks, patches of 2 cells."""
    return _create("reslim_large", pretrained, SIZES["10b"], kwargs)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    return create(ReslimEncoder, variant, pretrained, defaults, kwargs, out_indices=3)
