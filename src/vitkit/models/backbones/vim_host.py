"""Vision Mamba: the plain ViT with a scan in both directions for attention, no MLP, a class token in the middle."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import RmsNorm, to_2tuple
from timm.models import generate_default_cfgs, register_model

from vitkit.models.backbones.contract import cfg, create, init_weights
from vitkit.models.parts.mixers.vim import Vim
from vitkit.models.presets import default_patch
from vitkit.models.ssm import mixer_only, own_names
from vitkit.models.vit import ViT

__all__ = ["VimHost"]


class VimHost(ViT):
    """The host with :class:`~vitkit.models.parts.mixers.vim.Vim` in every block: ``x ← x + Vim(RMSNorm(x))``.

    What works on a ViT without attention works on it: other parts, explainers that look at tokens. The slot ``mlp``
    gives its blocks the MLP that they do not have.

    Args:
        img_size, in_chans, num_classes, embed_dim, depth, drop_path_rate and the others: as in timm's ViT.
        patch_size: in pixels; None: 2 to 16 by image size.
        expand, d_state, d_conv: of the mixer.

    Shape: (B, C, H, W) → (B, num_classes).
    Raises: as timm's ViT.
    Paper: Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
        arXiv:2401.09417. One of the networks of Vision Mamba in Remote Sensing, arXiv:2505.00630.
    Departs from the paper: the two directions are summed, not averaged; patches do not overlap.
    """

    def __init__(
        self,
        *args: Any,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] | None = None,
        expand: float = 2,
        d_state: int = 16,
        d_conv: int = 4,
        **kwargs: Any,
    ) -> None:
        patch = to_2tuple(default_patch(img_size) if patch_size is None else patch_size)
        kwargs = {"norm_layer": partial(RmsNorm, eps=1e-5), "num_heads": 1, **kwargs}
        super().__init__(*args, img_size=img_size, patch_size=patch, **kwargs)
        grid = self.patch_embed.grid_size
        blocks: Any = self.blocks
        for block in blocks:
            mixer = Vim(self.embed_dim, expand=expand, d_state=d_state, d_conv=d_conv, grid=tuple(grid))
            mixer_only(block, mixer.apply(init_weights))
            with torch.no_grad():
                # the sum of L updates starts as large as one
                mixer.out_proj.weight.div_(len(blocks) ** 0.5)

    def no_weight_decay(self) -> set[str]:
        """Those of the state-space layers too; see :class:`~vitkit.models.ssm.SelectiveSSM`."""
        return set(super().no_weight_decay()) | own_names(self)


_SMALL = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
default_cfgs = generate_default_cfgs(
    {
        name: cfg(**changes, pool_size=None, first_conv="patch_embed.proj", fixed_input_size=True)
        for name, changes in {"vim_femto": _SMALL, "vim_tiny": {}, "vim_small": {}}.items()
    }
)


@register_model
def vim_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels: 64 wide, 6 blocks, 8 states; patch 2, 4 or 8 by image size."""
    sizes = {"img_size": 32, "embed_dim": 64, "depth": 6, "d_state": 8}
    return create(VimHost, "vim_femto", pretrained, sizes, kwargs, (-1,))


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """The paper's tiny one: 192 wide, 24 blocks, patches of 16 pixels."""
    sizes = {"patch_size": 16, "embed_dim": 192, "depth": 24}
    return create(VimHost, "vim_tiny", pretrained, sizes, kwargs, (-1,))


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """The paper's small one: 384 wide, 24 blocks, patches of 16 pixels."""
    sizes = {"patch_size": 16, "embed_dim": 384, "depth": 24}
    return create(VimHost, "vim_small", pretrained, sizes, kwargs, (-1,))
