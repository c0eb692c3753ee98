"""HGFormer: a pyramid of hypergraph attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import cfg, create, init_weights
from vitkit.models.backbones.pyramid import Halve, MapBlock, Pyramid, Stage, TokenBlock
from vitkit.models.parts.mixers.hypergraph import HypergraphAttention
from vitkit.models.vit import Attention, Block, Mlp

__all__ = ["HGFormer"]

#: hyperedges of a stage over its patches
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)


class PositionConv(nn.Conv2d):
    """Conditional positions: ``x + DWConv₃ₓ₃(x)`` on maps (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class HGFormer(Pyramid):
    """HyperGraph transFormer: convolutional stem, four stages, a class token that chooses the hyperedges' centres.

    A block is a depthwise 3×3 position code on the map, then pre-norm hypergraph attention and MLP with residuals on
    the tokens. Stages have M = N/16, N/8, N/4, N/2 hyperedges, but 4 to 64, of 2N/M members each. Between stages a 3×3
    convolution of stride 2 widens the map and a linear layer the class token, which is read at the end.

    Args:
        in_chans, num_classes, global_pool ("token", "avg", ""), drop_rate, drop_path_rate: as in timm.
        dims, depths, num_heads: of the stages. mlp_ratio: hidden width of the MLPs over C.
        patch: pixels per cell of the first stage, 4 or 2: two or one halving in the stem.
        topology, choose: of the attention, see ``hypergraph``.
        img_size: taken for timm's sake; any size from 4 pixels works.

    Shape: (B, C, H, W) → (B, num_classes).
    Paper: HGFormer: Topology-Aware Vision Transformer with HyperGraph Learning, arXiv:2504.02440.
    Departs from the paper: known by its abstract and a public review. Stem, widths, depths and numbers of hyperedges
        are ours.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        patch: int = 4,
        topology: str = "bias",
        choose: str = "cls",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        if patch not in (2, 4):
            raise BadInput(f"HGFormer: patch={patch} must be 4 or 2, as the stem has two convolutions.")
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            made: list[nn.Module] = []
            for rate in rates[i]:
                block = Block(
                    dim,
                    num_heads[i],
                    mlp_ratio=mlp_ratio,
                    drop_path=rate,
                    norm_layer=partial(nn.LayerNorm, eps=1e-6),
                    attn_layer=Attention,
                    mlp_layer=Mlp,
                )
                share = SHARES[min(i, len(SHARES) - 1)]
                block.attn = HypergraphAttention(dim, num_heads[i], share, None, topology, choose)
                made += [MapBlock(PositionConv(dim)), TokenBlock(block)]
            if i == 0:
                stages.append(Stage(made))
            else:
                merge = nn.Sequential(Halve(dims[i - 1], dim), LayerNorm2d(dim))
                stages.append(Stage(made, merge, nn.Linear(dims[i - 1], dim)))
        half = dims[0] // 2
        stem = nn.Sequential(
            Halve(in_chans, half, bias=False),
            nn.BatchNorm2d(half),
            nn.GELU(),
            Halve(half, dims[0], bias=False) if patch == 4 else nn.Conv2d(half, dims[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(dims[0]),
        )
        super().__init__(
            stem,
            stages,
            list(dims),
            [patch * 2**i for i in range(len(dims))],
            nn.LayerNorm(dims[-1], eps=1e-6),
            class_token=True,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.apply(init_weights)


default_cfgs = generate_default_cfgs(
    {
        "hgformer_femto": cfg(input_size=(3, 32, 32), pool_size=(2, 2), first_conv="stem.0"),
        "hgformer_tiny": cfg(first_conv="stem.0"),
        "hgformer_small": cfg(first_conv="stem.0"),
        "hgformer_base": cfg(first_conv="stem.0"),
    }
)


@register_model
def hgformer_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels: dims 32/64/96/128, 1/1/2/1 blocks, cells of 2 pixels."""
    sizes = {"dims": (32, 64, 96, 128), "depths": (1, 1, 2, 1), "num_heads": (2, 4, 4, 4)}
    return create(HGFormer, "hgformer_femto", pretrained, {**sizes, "mlp_ratio": 2.0, "patch": 2}, kwargs)


@register_model
def hgformer_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """Dims 64/128/256/512, 2/2/6/2 blocks: 17.7 M parameters."""
    return create(HGFormer, "hgformer_tiny", pretrained, {}, kwargs)


@register_model
def hgformer_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """Dims 64/128/320/512, 3/4/12/3 blocks: 36 M parameters."""
    sizes = {"dims": (64, 128, 320, 512), "depths": (3, 4, 12, 3), "num_heads": (2, 4, 10, 16)}
    return create(HGFormer, "hgformer_small", pretrained, sizes, kwargs)


@register_model
def hgformer_base(pretrained: bool = False, **kwargs: Any) -> Any:
    """Dims 96/192/384/768, 3/4/18/3 blocks: 79 M parameters."""
    sizes = {"dims": (96, 192, 384, 768), "depths": (3, 4, 18, 3), "num_heads": (3, 6, 12, 24)}
    return create(HGFormer, "hgformer_base", pretrained, sizes, kwargs)
