"""ECViT: a light pyramid whose attention stays inside blocks of tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import cfg, create, init_weights, of_size
from vitkit.models.backbones.pyramid import Halve, Pyramid, Stage, State, TokenBlock
from vitkit.models.parts.mixers.partitioned_attention import PartitionedAttention
from vitkit.models.parts.mlps.interactive_ffn import InteractiveFFN
from vitkit.models.vit import Block

__all__ = ["ECViT"]

# one node of a torch.fx graph here, too
torch.fx.wrap("of_size")


class ConvStemHV(nn.Module):
    """Two directional convolutions, a pooling and a patch projection: ``f = GELU(BN(conv 1×k))``, then ``k×1`` on it.

    Args:
        in_chans: C. width: channels of both convolutions. dim: D of the tokens.
        patch: side of a patch behind the pooling. kernel: k, odd.

    Shape: (B, C, H, W) → (B, D, h, w), one cell for 4·patch pixels.
    """

    def __init__(self, in_chans: int, width: int, dim: int, patch: int, kernel: int = 7) -> None:
        super().__init__()
        half = kernel // 2
        self.across = nn.Conv2d(in_chans, width, (1, kernel), stride=(1, 2), padding=(0, half), bias=False)
        self.down = nn.Conv2d(width, width, (kernel, 1), stride=(2, 1), padding=(half, 0), bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.act = nn.GELU()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.proj = nn.Conv2d(width, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.across(x)))
        return self.proj(self.pool(self.act(self.norm2(self.down(x)))))


class ECViT(Pyramid):
    """Efficient Convolutional Vision Transformer: conv stem, stages of (P-MSA, I-FFN) blocks, merging between them.

    Blocks are pre-norm with residuals; between stages a 3×3 convolution of stride 2 doubles the channels of the map
    and a linear layer those of the class token, which is read at the end.

    Args:
        img_size: (H, W) or a side, for the position table; other sizes are refused.
        in_chans, num_classes, global_pool ("token", "avg", ""), drop_rate: as in timm.
        dims, depths, num_heads, blocks: of the stages; ``blocks`` are n_b of the partitioned attention.
        mlp_ratio: r of the interactive FFN. stem_width: channels of the directional convolutions.
        patch: side of a patch behind them, so that a token of the first stage stands for 4·patch pixels a side.
        drop_path_rate: stochastic depth of the last block, growing linearly.

    Shape: (B, C, H, W) → (B, num_classes).
    Raises: BadInput if the image is too small for the stages, or has another size than ``img_size``.
    Paper: ECViT: Efficient Convolutional Vision Transformer with Local-Attention and Multi-scale Stages,
        arXiv:2504.14825.
    Departs from the paper: known by its abstract and public formulas. Kernel sizes, widths and depths are ours, near
        its 4.888 M parameters (here 5.02 M with 10 classes, 5.27 M with 1,000, and 0.52 G multiplications at 224).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        dims: tuple[int, ...] = (64, 128, 256),
        depths: tuple[int, ...] = (2, 2, 5),
        num_heads: tuple[int, ...] = (2, 4, 8),
        blocks: tuple[int, ...] = (16, 4, 1),
        mlp_ratio: float = 4.0,
        stem_width: int = 32,
        patch: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        size = to_2tuple(img_size)
        grids = [tuple(side // (4 * patch) for side in size)]
        for _ in dims[1:]:
            grids.append(tuple((side + 1) // 2 for side in grids[-1]))
        if min(grids[0]) < 1 or any(side % (4 * patch) for side in size):
            raise BadInput(
                f"ECViT: img_size={size[0]}×{size[1]} must be a multiple of {4 * patch} pixels (patch={patch} behind "
                "a stem of stride 4)."
            )
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, grid) in enumerate(zip(dims, grids)):
            made = []
            for j in range(depths[i]):
                block = Block(
                    dim,
                    num_heads[i],
                    qkv_bias=True,
                    drop_path=rates[i][j],
                    norm_layer=partial(nn.LayerNorm, eps=1e-6),
                    attn_layer=PartitionedAttention,
                    mlp_layer=_no_mlp,
                )
                block.attn.set_blocks(blocks[i], grid)
                block.mlp = InteractiveFFN(dim, round(dim * mlp_ratio))
                made.append(TokenBlock(block))
            if i == 0:
                stages.append(Stage(made))
            else:
                merge = nn.Sequential(Halve(dims[i - 1], dim), LayerNorm2d(dim))
                stages.append(Stage(made, merge, nn.Linear(dims[i - 1], dim)))
        super().__init__(
            ConvStemHV(in_chans, stem_width, dims[0], patch),
            stages,
            list(dims),
            [4 * patch * 2**i for i in range(len(dims))],
            nn.LayerNorm(dims[-1], eps=1e-6),
            class_token=True,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.img_size = size
        self.pos_embed = nn.Parameter(
            nn.init.trunc_normal_(self.stem.proj.weight.new_empty(1, dims[0], *grids[0]), std=0.02)
        )
        self.apply(init_weights)

    def begin(self, images: Tensor) -> State:
        state = super().begin(of_size(images, self.img_size, "ECViT"))
        return state._replace(map=state.map + self.pos_embed)


def _no_mlp(*_: Any, **__: Any) -> nn.Module:
    """Keeps the place of the MLP until the block is made."""
    return nn.Identity()


default_cfgs = generate_default_cfgs(
    {
        "ecvit_femto": cfg(input_size=(3, 32, 32), pool_size=(2, 2), first_conv="stem.across", fixed_input_size=True),
        "ecvit_tiny": cfg(first_conv="stem.across", fixed_input_size=True),
        "ecvit_small": cfg(first_conv="stem.across", pool_size=(4, 4), fixed_input_size=True),
    }
)


@register_model
def ecvit_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 28 to 64 pixels: dims 48/96/192, 1/1/2 blocks, 4-pixel tokens."""
    sizes = {"dims": (48, 96, 192), "depths": (1, 1, 2), "num_heads": (2, 3, 6), "blocks": (4, 1, 1), "mlp_ratio": 2.0}
    defaults = {**sizes, "patch": 1, "stem_width": 24}
    return create(ECViT, "ecvit_femto", pretrained, defaults, kwargs, (0, 1, 2))


@register_model
def ecvit_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """The paper's budget: 5.0 M parameters with 10 classes."""
    return create(ECViT, "ecvit_tiny", pretrained, {}, kwargs, (0, 1, 2))


@register_model
def ecvit_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """A fourth stage of 320 channels."""
    sizes = {"dims": (64, 128, 256, 320), "depths": (2, 2, 6, 2), "num_heads": (2, 4, 8, 10), "blocks": (16, 4, 1, 1)}
    return create(ECViT, "ecvit_small", pretrained, sizes, kwargs, (0, 1, 2, 3))
