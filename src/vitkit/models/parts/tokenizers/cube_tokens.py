"""Tokens of several dates, or of several groups of bands: one for each patch and date, on a grid with three axes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

# B batch · C channels · T groups · h×w patches · D width


class CubeTokens(nn.Module):
    """Cuts the channels into T groups and embeds the patches of each: T·h·w tokens on a grid (T, h, w).

    ``x_{tn} = K patch_{tn} + b + e_t`` with one kernel for all groups, and the host's position of patch n. Groups are
    dates (the channels of a date stand together) or neighbouring bands. The mixers ``mamba``, ``vim``, ``ss2d``,
    ``s4d`` and ``mamba2`` choose by their order how such a grid is walked (:mod:`vitkit.models.time_order`);
    attention sees all tokens. The cost grows with T.

    Args:
        groups: T, divides C; None: every channel is a group. With one group the grid is (h, w), as without this part.

    Shape: images (B, C, H, W), or (B, T, C/T, H, W) → tokens (B, T·h·w, D) and a layout with grid (T, h, w).

    Raises: BadInput if ``groups`` does not divide C, images have other channels or cannot be cut into whole patches, or
        another part stands in the slot already.

    Paper: several dates and cubes of bands in Vision Mamba in Remote Sensing, arXiv:2505.00630.

    Departs from the paper: a survey's mechanism class in its plainest form. In a host with weights, K starts as the
        sum of the groups' kernels: if they are equal, the mean over t of the tokens is the host's token.
    """

    slot = "tokenizer"
    preserves = "none"

    @classmethod
    def from_standard(cls, old: nn.Module, spec: PartSpec, warm: bool = True, groups: int | None = None) -> CubeTokens:
        if getattr(old, "slot", None) == "tokenizer" and not isinstance(old, cls):
            raise BadInput(
                f"cube-tokens takes the place of the patch embedding, but the tokenizer is {type(old).__name__}; use "
                "it alone."
            )
        padded = getattr(old, "dynamic_img_pad", False)
        new = cls(spec.dim, spec.patch_size, spec.image_size, spec.in_chans, groups, padded)
        if warm and isinstance(old, PatchEmbed) and isinstance(old.proj, nn.Conv2d):
            with torch.no_grad():
                new.proj.weight.copy_(old.proj.weight.unflatten(1, (new.groups, -1)).sum(1))
                if old.proj.bias is not None and new.proj.bias is not None:
                    new.proj.bias.copy_(old.proj.bias)
        return new

    def __init__(
        self,
        dim: int,
        patch_size: tuple[int, int],
        img_size: tuple[int, int],
        in_chans: int,
        groups: int | None = None,
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        groups = in_chans if groups is None else groups
        if groups < 1 or in_chans % groups:
            fits = max(g for g in range(1, max(1, min(groups, in_chans)) + 1) if in_chans % g == 0)
            raise BadInput(
                f"cube-tokens: groups={groups} does not divide the {in_chans} channels of the images; groups={fits} "
                "would."
            )
        self.patch_size, self.img_size, self.dynamic_img_pad = tuple(patch_size), tuple(img_size), dynamic_img_pad
        self.groups, self.in_chans = groups, in_chans
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = math.prod(self.grid_size) * groups
        self.proj = nn.Conv2d(in_chans // groups, dim, patch_size, stride=patch_size)
        self.group_embed = nn.Parameter(torch.empty(groups, 1, dim))
        nn.init.trunc_normal_(self.group_embed, std=0.02)

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
        """The plane (h, w) of an image of (H, W) pixels."""
        (height, width), (p_h, p_w) = img_size, self.patch_size
        if self.dynamic_img_pad:
            return math.ceil(height / p_h), math.ceil(width / p_w)
        return height // p_h, width // p_w

    def forward(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        if images.ndim == 5:
            images = images.flatten(1, 2)
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise BadInput(
                f"cube-tokens was made for images of {self.in_chans} channels, and these are "
                f"{'×'.join(map(str, images.shape))}; build the model with in_chans={images.shape[1]}."
            )
        (height, width), (p_h, p_w) = images.shape[-2:], self.patch_size
        if self.dynamic_img_pad:
            images = F.pad(images, (0, -width % p_w, 0, -height % p_h))
        elif height % p_h or width % p_w:
            raise BadInput(
                f"cube-tokens: images of {height}×{width} pixels cannot be cut into {p_h}×{p_w} patches; resize them "
                f"to {max(height // p_h, 1) * p_h}×{max(width // p_w, 1) * p_w}."
            )
        maps = self.proj(images.unflatten(1, (self.groups, -1)).flatten(0, 1))
        plane = (maps.shape[2], maps.shape[3])
        # (B, T, D, N) → (B, T, N, D)
        x = maps.unflatten(0, (-1, self.groups)).flatten(3).transpose(2, 3) + self.group_embed
        return x.flatten(1, 2), TokenLayout(grid=plane if self.groups == 1 else (self.groups, *plane))

    def pick_positions(self, table: Tensor, grid: tuple[int, ...], layout: TokenLayout) -> Tensor:
        """The host's table (1, h·w, D), resampled to the plane of these images, once for each group."""
        plane = tuple(layout.grid[-2:])
        if plane != tuple(grid):
            table = resample_abs_pos_embed(table, new_size=list(plane), old_size=list(grid), num_prefix_tokens=0)
        return table.repeat(1, self.groups, 1)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"
