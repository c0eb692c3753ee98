"""LViT: a ViT whose every token is a point of hyperbolic space."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import Backbone, cfg, create, of_size
from vitkit.models.lorentz.attention import LorentzAttention
from vitkit.models.lorentz.embed import LorentzPatchEmbed, LorentzPositions
from vitkit.models.lorentz.head import LorentzMLR
from vitkit.models.lorentz.layers import LorentzDropout, LorentzLayerNorm, LorentzMlp, LorentzResidual
from vitkit.models.lorentz.manifold import Curvature, Curved, centroid
from vitkit.models.presets import default_patch

__all__ = ["LViT", "LorentzBlock"]

# B batch · N tokens · D coordinates of a token, time first · c: the curvature is −1/c


# they ask for the dtype or the size of what they get, which torch.fx cannot
register_notrace_module(LorentzPatchEmbed)
register_notrace_module(LorentzResidual)
register_notrace_module(LorentzMLR)
torch.fx.wrap("centroid")
torch.fx.wrap("of_size")


class Points(NamedTuple):
    """What walks through the blocks.

    Attributes: x: (B, N, D). c: of the curvature −1/c. grid: (h, w) of the patches.
    """

    x: Tensor
    c: Curved
    grid: tuple[int, int]


@register_notrace_module  # reason: its layers ask for the dtype
class LorentzBlock(nn.Module):
    """LayerNorm, attention, residual; LayerNorm, MLP, residual, all on points.

    Args:
        features: D. num_heads: H. hidden: coordinates inside the MLP.
        variant: of :class:`~vitkit.models.lorentz.attention.LorentzAttention`.
        prenorm: "stream": the first norm also replaces what the attention is added to, as in the authors' code;
            "branch": it is seen by the attention alone.
        scale, learn_scale: of both residuals, see :class:`~vitkit.models.lorentz.layers.LorentzResidual`.
        drop: rate behind the MLP.

    Shape: :class:`Points` → :class:`Points`.
    Raises: BadInput for another ``prenorm``.
    Paper: HyperCore, arXiv:2504.08912.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        hidden: int,
        variant: Literal["full", "linear"] = "full",
        prenorm: Literal["stream", "branch"] = "stream",
        scale: float = 27.5,
        learn_scale: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if prenorm not in ("stream", "branch"):
            raise BadInput(f"prenorm={prenorm!r} must be 'stream' (the authors' code) or 'branch' (the usual one).")
        self.prenorm = prenorm
        self.norm1, self.norm2 = LorentzLayerNorm(features), LorentzLayerNorm(features)
        self.attn = LorentzAttention(features, num_heads, variant)
        self.mlp = LorentzMlp(features, hidden, drop)
        self.residual1, self.residual2 = (LorentzResidual(scale, learn_scale) for _ in range(2))

    def forward(self, state: Points) -> Points:
        x, c, _ = state
        normed = self.norm1(x, c)
        x = self.residual1(normed if self.prenorm == "stream" else x, self.attn(normed, c), c)
        x = self.residual2(x, self.mlp(self.norm2(x, c), c), c)
        return state._replace(x=x)


class LViT(Backbone):
    """Lorentz Vision Transformer: patches, blocks, pooling and classifier on the Lorentz model of curvature −1/c.

    Each layer acts on the space part of a point and computes its time part anew; there is no way through a tangent
    space. The tokens' Lorentz centroid goes to a classifier by distances from hyperbolic planes. Positions are points,
    too: any optimizer keeps them on the sheet, :class:`~vitkit.train.optimizers.riemannian_adam.RiemannianAdam` also
    follows its geometry. Features and maps hold all coordinates, time first, in float32 (or float64), whatever the
    dtype of the weights; logits have the weights' dtype.

    Args:
        img_size: (H, W) or a side, for the positions; other sizes are refused.
        patch_size, in_chans, num_classes, depth, num_heads, mlp_ratio: as in timm.
        global_pool: "centroid", or "" for all tokens.
        embed_dim: D, coordinates of a token with time, a multiple of ``num_heads``: each head has one time coordinate.
        curvature: c of the curvature −1/c, positive; the larger, the flatter. learn_curvature: c = softplus(raw).
        attention: "full", or "linear" in the number of tokens.
        prenorm: "stream" or "branch", see :class:`LorentzBlock`.
        residual_scale: of the residuals in the blocks; None: √(D−1), about the length of a normed token.
        learn_scale: learn these scales.
        head_scale: of the classifier's normals at the start, see :class:`~vitkit.models.lorentz.head.LorentzMLR`.
        proj_drop_rate: dropout behind every MLP. drop_rate: before the classifier.

    Shape: (B, C, H, W) → (B, num_classes).
    Raises: BadInput for impossible sizes or images of another size; ValueError for another pooling.
    Paper: HyperCore: The Core Framework for Building Hyperbolic Foundation Models with Comprehensive Modules,
        arXiv:2504.08912.
    Departs from the paper: see the layers. One curvature for the whole network, and no dropout by default (0.1 in its
        code, which gives the base network); widths of the smaller ones are ours.
    """

    pools = ("centroid", "")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 780,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        curvature: float = 1.0,
        learn_curvature: bool = False,
        attention: Literal["full", "linear"] = "full",
        prenorm: Literal["stream", "branch"] = "stream",
        residual_scale: float | None = None,
        learn_scale: bool = False,
        head_scale: float = 1.0,
        proj_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        size = to_2tuple(img_size)
        grid = (size[0] // patch_size, size[1] // patch_size)
        if min(grid) < 1 or any(side % patch_size for side in size):
            raise BadInput(f"LViT: img_size={size[0]}×{size[1]} must be a multiple of patch_size={patch_size}.")
        self.img_size, self.grid_size = size, grid
        self.embed_dim, self.head_scale = embed_dim, head_scale
        self.curvature = Curvature(curvature, learn_curvature)
        self.patch_embed = LorentzPatchEmbed(patch_size, in_chans, embed_dim)
        self.positions = LorentzPositions(grid, embed_dim)
        self.add_positions = LorentzResidual(1.0)
        scale = math.sqrt(embed_dim - 1) if residual_scale is None else residual_scale
        # one coordinate of time on top
        hidden = round(mlp_ratio * embed_dim) + 1
        self.stages = nn.ModuleList(
            LorentzBlock(embed_dim, num_heads, hidden, attention, prenorm, scale, learn_scale, proj_drop_rate)
            for _ in range(depth)
        )
        self.finish_init([embed_dim] * depth, [patch_size] * depth, num_classes, in_chans, global_pool)
        self.head_drop = LorentzDropout(drop_rate)  # type: ignore[assignment]
        self.head = LorentzMLR(embed_dim, num_classes, head_scale) if num_classes else nn.Identity()

    def begin(self, images: Tensor) -> Points:
        images, c = of_size(images, self.img_size, "LViT"), self.curvature()
        return Points(self.add_positions(self.patch_embed(images, c), self.positions(c), c), c, self.grid_size)

    def as_map(self, state: Points) -> Tensor:
        return state.x.transpose(1, 2).unflatten(2, state.grid)

    def features(self, state: Points) -> Tensor:
        return state.x

    def pool(self, features: Tensor) -> Tensor:
        """The tokens' Lorentz centroid (B, D); "" leaves the tokens."""
        return features if self.global_pool == "" else centroid(features, self.curvature())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Points (B, N, D) → logits (B, K), or the point (B, D) that the classifier gets."""
        c = self.curvature()
        x = self.head_drop(self.pool(x), c)
        return x if pre_logits or not self.num_classes else self.head(x, c)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for ``num_classes`` classes (0: none), on the device of the network."""
        super().reset_classifier(0, global_pool)
        self.num_classes = num_classes
        if num_classes:
            like = next(self.parameters())
            self.head = LorentzMLR(self.embed_dim, num_classes, self.head_scale).to(like.device, like.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer-wise learning rates."""
        stem = r"^patch_embed|^positions|^add_positions|^curvature"
        return {"stem": stem, "blocks": [(r"^stages\.(\d+)", None)]}


default_cfgs = generate_default_cfgs(
    {
        "lvit_femto": cfg(input_size=(3, 32, 32), pool_size=None, fixed_input_size=True),
        "lvit_tiny": cfg(pool_size=None, fixed_input_size=True),
        "lvit_small": cfg(pool_size=None, fixed_input_size=True),
        "lvit_base": cfg(pool_size=None, fixed_input_size=True),
    }
)


@register_model
def lvit_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels: 4 heads of 16 + 1 coordinates, 4 blocks; patch 2, 4 or 8 by image size."""
    size = to_2tuple(kwargs.get("img_size") or 32)
    sizes = {"img_size": 32, "patch_size": default_patch(size), "embed_dim": 68, "depth": 4, "num_heads": 4}
    return _create("lvit_femto", pretrained, {**sizes, "mlp_ratio": 2.0}, kwargs)


@register_model
def lvit_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """3 heads of 64 + 1 coordinates, 12 blocks."""
    return _create("lvit_tiny", pretrained, {"embed_dim": 195, "num_heads": 3}, kwargs)


@register_model
def lvit_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """6 heads of 64 + 1 coordinates, 12 blocks."""
    return _create("lvit_small", pretrained, {"embed_dim": 390, "num_heads": 6}, kwargs)


@register_model
def lvit_base(pretrained: bool = False, **kwargs: Any) -> Any:
    """The paper's network: 12 heads of 64 + 1 coordinates, 12 blocks, residuals scaled by 27.5."""
    return _create("lvit_base", pretrained, {"residual_scale": 27.5}, kwargs)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    return create(LViT, variant, pretrained, defaults, kwargs, out_indices=3)
