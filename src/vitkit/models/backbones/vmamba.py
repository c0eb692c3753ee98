"""VMamba: a pyramid of blocks that scan the map along rows and columns in both directions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import cfg, create, init_weights
from vitkit.models.backbones.pyramid import Pyramid, Stage, TokenBlock
from vitkit.models.parts.mixers.ss2d import SS2D
from vitkit.models.scan_order import CROSS
from vitkit.models.ssm import mixer_only, own_names
from vitkit.models.vit import Block

__all__ = ["PatchMerging", "VMamba"]


class PatchMerging(nn.Module):
    """Four neighbours become one cell: their channels one after another, LayerNorm, linear to C'.

    Shape: (B, C, H, W) → (B, C', ⌈H/2⌉, ⌈W/2⌉); an odd side gets a row or column of zeros.
    """

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(4 * in_chans)
        self.reduction = nn.Conv2d(4 * in_chans, out_chans, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.reduction(self.norm(F.pixel_unshuffle(x, 2)))


def vss_block(
    dim: int,
    orders: tuple[str, ...] | str = CROSS,
    expand: float = 2,
    d_state: int = 16,
    grid: tuple[int, int] | None = None,
    drop_path: float = 0.0,
) -> TokenBlock:
    """``x ← x + SS2D(LN(x))`` on a map, for stages; options as in :class:`~vitkit.models.parts.mixers.ss2d.SS2D`."""
    block = Block(dim, 1, drop_path=drop_path, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    return TokenBlock(mixer_only(block, SS2D(dim, orders, expand, d_state, grid=grid, num_prefix=0)))


class VMamba(Pyramid):
    """Patch embedding, stages of VSS blocks ``x ← x + SS2D(LN(x))`` without MLP, patch merging between them.

    Args:
        img_size: (H, W) or a side: the paths of its maps are kept ready; every other size works too.
        in_chans, num_classes, global_pool ("avg", ""), drop_rate: as in timm.
        dims, depths: of the stages.
        patch: side of a patch in pixels.
        orders, expand, d_state: of :class:`~vitkit.models.parts.mixers.ss2d.SS2D`.
        drop_path_rate: stochastic depth of the last block, growing linearly.

    Shape: (B, C, H, W) → (B, num_classes).
    Raises: BadInput if a side of the image is no multiple of ``patch``.
    Paper: VMamba: Visual State Space Model, arXiv:2401.10166; its first version, whose block has no MLP. One of the
        networks of Vision Mamba in Remote Sensing, arXiv:2505.00630.
    Departs from the paper: nothing but the order of the four neighbours' channels in patch merging.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 9, 2),
        patch: int = 4,
        orders: tuple[str, ...] | str = CROSS,
        expand: float = 2,
        d_state: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        size = to_2tuple(img_size)
        grids = [(size[0] // patch, size[1] // patch)]
        for _ in dims[1:]:
            grids.append(((grids[-1][0] + 1) // 2, (grids[-1][1] + 1) // 2))
        if min(grids[0]) < 1:
            raise BadInput(f"img_size={size} is smaller than a patch of {patch} pixels; give at least {patch}.")
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, grid) in enumerate(zip(dims, grids)):
            blocks = [vss_block(dim, orders, expand, d_state, grid, rate) for rate in rates[i]]
            stages.append(Stage(blocks, PatchMerging(dims[i - 1], dim) if i else None))
        super().__init__(
            nn.Sequential(nn.Conv2d(in_chans, dims[0], patch, stride=patch), LayerNorm2d(dims[0])),
            stages,
            list(dims),
            [patch * 2**i for i in range(len(dims))],
            LayerNorm2d(dims[-1]),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.patch = patch
        for module in self.modules():
            # the depthwise convolutions keep PyTorch's own start, as in the authors' code
            if isinstance(module, nn.Linear):
                init_weights(module)

    def begin(self, images: Tensor) -> Any:
        return super().begin(whole_patches(images, self.patch))

    def no_weight_decay(self) -> set[str]:
        """Those of the state-space layers too; see :class:`~vitkit.models.ssm.SelectiveSSM`."""
        return super().no_weight_decay() | own_names(self)


@torch.fx.wrap
def whole_patches(images: Tensor, patch: int) -> Tensor:
    """The images (…, H, W) as they are; BadInput if ``patch`` does not divide their sides."""
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise BadInput(f"Images of {height}×{width} pixels do not divide into patches of {patch}; resize them.")
    return images


default_cfgs = generate_default_cfgs(
    {
        "vmamba_femto": cfg(input_size=(3, 32, 32), pool_size=(2, 2), first_conv="stem.0"),
        "vmamba_tiny": cfg(first_conv="stem.0"),
        "vmamba_small": cfg(first_conv="stem.0"),
        "vmamba_base": cfg(first_conv="stem.0"),
    }
)


@register_model
def vmamba_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 28 to 64 pixels: dims 48/96/192, 1/1/2 blocks, 4-pixel tokens, 8 states."""
    sizes = {"img_size": 32, "dims": (48, 96, 192), "depths": (1, 1, 2), "d_state": 8}
    return create(VMamba, "vmamba_femto", pretrained, sizes, kwargs, (0, 1, 2))


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """The paper's tiny one: dims 96 to 768, 2/2/9/2 blocks."""
    return create(VMamba, "vmamba_tiny", pretrained, {}, kwargs)


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """The paper's small one: dims 96 to 768, 2/2/27/2 blocks."""
    return create(VMamba, "vmamba_small", pretrained, {"depths": (2, 2, 27, 2)}, kwargs)


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> Any:
    """The paper's base one: dims 128 to 1,024, 2/2/27/2 blocks."""
    sizes = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 27, 2)}
    return create(VMamba, "vmamba_base", pretrained, sizes, kwargs)
