"""ClusterViG: graph convolutions within clusters of patches, at one resolution throughout."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import Backbone, cfg, create, init_weights
from vitkit.models.backbones.pyramid import Halve
from vitkit.models.cells import as_tokens
from vitkit.models.parts.mixers.degc import DEGC, neighbours_at
from vitkit.models.presets import default_patch

__all__ = ["ClusterViG"]

# B batch · C width · h×w map of N cells


@register_notrace_module  # reason: the data decide on the clusters
class ClusterBlock(nn.Module):
    """``x ← x + DEGC(x + DWConv₇ₓ₇(x))``, then ``x ← x + FFN(x)`` of 1×1 convolutions with batch norm and GELU.

    Shape: (B, C, h, w) → the same.
    """

    def __init__(self, dim: int, mixer: DEGC, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        hidden = round(dim * mlp_ratio)
        # its bias would be the same for all cells, which the batch norm behind takes out again
        self.position = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, bias=False)
        self.mixer = mixer
        self.ffn = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = as_tokens(x + self.position(x))
        x = x + self.drop_path(self.mixer.convolve(tokens).transpose(1, 2).reshape(x.shape))
        return x + self.drop_path(self.ffn(x))


class ClusterViG(Backbone):
    """Vision graph network of DEGC blocks (see ``degc``): stem, learned positions, blocks, mean, two-layer head.

    Args:
        img_size: (H, W) or a side, for the position table, which is resampled for other sizes.
        in_chans, num_classes, global_pool ("avg", ""), drop_rate, drop_path_rate: as in timm.
        patch: pixels per cell, a power of two; the stem halves as often as that needs.
        stem_layers: its 3×3 convolutions, at least one more than it halves.
        dim, depth: C and number of blocks. mlp_ratio: hidden width of the FFN over C.
        clusters, k, conv: of the graph convolution; k grows linearly over depth to 2k.
        head_width: channels between pooling and classifier.
        distilled: a second classifier; logits are the mean of both, except in training after
            ``set_distilled_training(True)``, where both come out.

    Shape: (B, C, H, W) → (B, num_classes). Every block counts as a stage of timm's features.
    Raises: BadInput if ``patch`` is no power of two.
    Paper: ClusterViG: Efficient Globally Aware Vision GNNs via Image Partitioning, arXiv:2501.10640.
    Departs from the paper: positions resampled for other image sizes, and the small size, are ours.
    """

    export_note = DEGC.export_note

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        patch: int = 16,
        dim: int = 192,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        clusters: int = 4,
        k: int = 9,
        conv: str = "mr",
        head_width: int = 1024,
        stem_layers: int = 5,
        distilled: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        halvings = int(math.log2(max(1, patch)))
        if patch != 2**halvings or patch < 2:
            raise BadInput(f"ClusterViG: patch={patch} must be a power of two, as the stem halves; use 2, 4, 8 or 16.")
        self.stem = _stem(in_chans, dim, halvings, stem_layers)
        grid = [-(-side // patch) for side in to_2tuple(img_size)]
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, *grid))
        (rates,) = calculate_drop_path_rates(drop_path_rate, [depth], stagewise=True)
        self.stages = nn.ModuleList(
            ClusterBlock(dim, DEGC(dim, clusters, neighbours_at(i, depth, k), conv), mlp_ratio, rates[i])
            for i in range(depth)
        )
        self.finish_init(
            [dim] * depth, [patch] * depth, num_classes, in_chans, global_pool, drop_rate, head_width=head_width
        )
        # the bias of the linear layer would be taken out again by the batch norm
        self.head_norm = nn.Sequential(nn.Linear(dim, head_width, bias=False), nn.BatchNorm1d(head_width), nn.GELU())
        self.head_dist: nn.Module | None = None
        self.distilled_training = False
        if distilled:
            self.head_dist = nn.Linear(head_width, num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def begin(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return x + _resampled(self.pos_embed, x)

    def as_map(self, state: Tensor) -> Tensor:
        return state

    def features(self, state: Tensor) -> Tensor:
        return state

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        if self.head_dist is None or pre_logits:
            return super().forward_head(x, pre_logits)
        x = super().forward_head(x, pre_logits=True)
        logits, distilled = self.head(x), self.head_dist(x)
        return (logits, distilled) if self.training and self.distilled_training else (logits + distilled) / 2

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training return both logits, of labels and of the teacher, instead of their mean."""
        self.distilled_training = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.head_dist is not None:
            like = next(self.parameters())
            head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
            self.head_dist = head.to(like.device, like.dtype)


@torch.fx.wrap
def _resampled(table: Tensor, x: Tensor) -> Tensor:
    """The table (1, C, h', w') at the size of the map x (B, C, h, w)."""
    if x.shape[2:] == table.shape[2:]:
        return table
    return F.interpolate(table, x.shape[2:], mode="bicubic", align_corners=False)


def _stem(in_chans: int, dim: int, halvings: int, num_layers: int) -> nn.Sequential:
    num_layers = max(halvings + 1, num_layers)
    layers: list[nn.Module] = []
    before = in_chans
    for i in range(num_layers):
        # doubling up to C, which the last two have
        width = dim if i >= num_layers - 2 else max(dim // 2 ** (num_layers - 2 - i), min(dim, 64))
        # a bias would be taken out again by the batch norm
        halves = i < halvings
        conv = Halve(before, width, bias=False) if halves else nn.Conv2d(before, width, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.GELU()]
        before = width
    return nn.Sequential(*layers[:-1])


default_cfgs = generate_default_cfgs(
    {
        "clustervig_femto": cfg(input_size=(3, 32, 32), pool_size=(8, 8), first_conv="stem.0"),
        "clustervig_ti": cfg(pool_size=(14, 14), first_conv="stem.0"),
        "clustervig_s": cfg(pool_size=(14, 14), first_conv="stem.0"),
        "clustervig_b": cfg(pool_size=(14, 14), first_conv="stem.0"),
    }
)


@register_model
def clustervig_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels: 64 wide, 4 blocks; patch 2, 4, 8 or 16 by image size."""
    size = to_2tuple(kwargs.get("img_size") or 32)
    sizes = {"img_size": 32, "patch": default_patch(size), "dim": 64, "depth": 4, "mlp_ratio": 2.0, "head_width": 256}
    return _create("clustervig_femto", pretrained, {**sizes, "stem_layers": 3}, kwargs, 4)


@register_model
def clustervig_ti(pretrained: bool = False, **kwargs: Any) -> Any:
    """192 wide, 12 blocks, 14×14 cells; ``patch=8, clusters=6`` gives the 28×28 variant."""
    return _create("clustervig_ti", pretrained, {}, kwargs, 12)


@register_model
def clustervig_s(pretrained: bool = False, **kwargs: Any) -> Any:
    """320 wide, 16 blocks, 14×14 cells; ``patch=8, clusters=6`` gives the 28×28 variant."""
    return _create("clustervig_s", pretrained, {"dim": 320, "depth": 16}, kwargs, 16)


@register_model
def clustervig_b(pretrained: bool = False, **kwargs: Any) -> Any:
    """640 wide, 16 blocks, 14×14 cells; ``patch=8, clusters=6`` gives the 28×28 variant."""
    return _create("clustervig_b", pretrained, {"dim": 640, "depth": 16}, kwargs, 16)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any], depth: int) -> Any:
    depth = kwargs.get("depth", depth)
    quarters = tuple(sorted({depth * (i + 1) // 4 - 1 for i in range(4)} - {-1}))
    return create(ClusterViG, variant, pretrained, defaults, kwargs, out_indices=quarters)
