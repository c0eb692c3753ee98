"""iiANET: a pyramid of blocks that run convolutions and attention side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import cfg, create, init_weights
from vitkit.models.backbones.pyramid import Halve, MapBlock, Pyramid, Stage, State
from vitkit.models.iia import IIA, SPLIT, ChannelGate

__all__ = ["IIANet"]


class IIANet(Pyramid):
    """Inception Inspired Attention Network: a stem of two convolutions, four stages of iiA blocks, mean, classifier.

    See :class:`~vitkit.models.iia.IIA` for the block. Between stages a channel gate weights the channels by their
    means, then a 2×2 max-pooling halves the map. A block's split follows the previous block's outputs, so the three
    branches meet in the gates and in the classifier only.

    Args:
        img_size: (H, W) or a side, for the relative positions, which are interpolated for other sizes.
        in_chans, num_classes, global_pool ("avg", ""), drop_rate (before the classifier): as in timm.
        stem: channels of the two 3×3 convolutions; the first has stride 2.
        stem_padding: 0 or 1 for these. stem_pool: 3×3 max-pooling of stride 2 behind them.
        widths: o of every block of every stage; a block's outputs are o times ``split``.
        num_heads: of the stages.
        registers: extra keys and values of every attention. Default 1.
        expansion: of the inverted bottlenecks.
        scaled: False leaves 1/√d out of the attention logits, as the published file does.
        split: shares of the channels for dilated convolution, inverted bottleneck, attention; 0 leaves a branch out.

    Shape: (B, C, H, W) → (B, num_classes).
    Raises: BadInput if the images are too small for the stages, or widths, heads and split do not fit together.
    Paper: iiANET: Inception Inspired Attention Hybrid Network for efficient Long-Range Dependency, arXiv:2407.07603.
    Departs from the paper: registers that work, relative positions on the query's side and scaled logits, see
        :class:`~vitkit.models.iia.RegisterAttention`; other image sizes; the two smaller networks.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 299,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        stem: tuple[int, int] = (32, 64),
        stem_padding: int = 0,
        stem_pool: bool = True,
        widths: Sequence[Sequence[int]] = ((20, 24), (32, 36, 40), (56, 80, 80, 88, 96), (128, 160)),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        registers: int = 1,
        expansion: int = 4,
        scaled: bool = True,
        split: Sequence[int] = SPLIT,
        drop_rate: float = 0.4,
    ) -> None:
        if len(num_heads) != len(widths) or not all(widths):
            raise BadInput(
                f"iiANET: num_heads={tuple(num_heads)} must be one number for each of the {len(widths)} stages of "
                "widths, and every stage must have a block."
            )
        grids = _grids(to_2tuple(img_size), stem_padding, stem_pool, len(widths))
        stages, dims, before = [], [], stem[1]
        for i, (stage, heads, grid) in enumerate(zip(widths, num_heads, grids)):
            down = nn.Sequential(ChannelGate(before), nn.MaxPool2d(2)) if i else None
            blocks = []
            for width in stage:
                outs = [width * share for share in split]
                blocks.append(MapBlock(IIA(before, outs, heads, grid, registers, expansion, scaled, split)))
                before = sum(outs)
            stages.append(Stage(blocks, down))
            dims.append(before)
        first = 4 if stem_pool else 2
        super().__init__(
            _stem(in_chans, stem, stem_padding, stem_pool),
            stages,
            dims,
            [first * 2**i for i in range(len(dims))],
            nn.Identity(),
            stem_dim=stem[1],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self._cut = (stem_padding, stem_pool, len(dims))
        self.apply(init_weights)

    def begin(self, images: Tensor) -> State:
        return super().begin(_large_enough(images, *self._cut))

    def no_weight_decay(self) -> set[str]:
        own = ("rel_h", "rel_w", "register_kv")
        return super().no_weight_decay() | {n for n, _ in self.named_parameters() if n.rpartition(".")[2] in own}


def _stem(in_chans: int, widths: tuple[int, int], padding: int, pool: bool) -> nn.Sequential:
    first = (
        Halve(in_chans, widths[0], bias=False)
        if padding
        else nn.Conv2d(in_chans, widths[0], 3, stride=2, padding=0, bias=False)
    )
    layers: list[nn.Module] = [first, nn.BatchNorm2d(widths[0]), nn.ReLU()]
    second = nn.Conv2d(widths[0], widths[1], 3, padding=padding, bias=False)
    layers += [second, nn.BatchNorm2d(widths[1]), nn.ReLU()]
    if pool:
        layers.append(nn.MaxPool2d(3, stride=2))
    return nn.Sequential(*layers)


def _grids(size: tuple[int, int], padding: int, pool: bool, num_stages: int) -> list[tuple[int, int]]:
    """Cells (H, W) of the stages' maps for images of ``size``; an error if the last one would be empty."""
    if padding not in (0, 1):
        raise BadInput(f"iiANET: stem_padding={padding} must be 0 or 1.")
    sides = []
    for side in size:
        side = (side + 2 * padding - 3) // 2 + 1 + 2 * padding - 2
        side = (side - 3) // 2 + 1 if pool else side
        sides.append([side // 2**i for i in range(num_stages)])
    if min(side[-1] for side in sides) < 1:
        smallest = 2 ** (num_stages - 1)
        smallest = 2 * smallest + 1 if pool else smallest
        smallest = 2 * (smallest - 2 * padding + 2 - 1) + 3 - 2 * padding
        raise BadInput(
            f"iiANET: images of {size[0]}×{size[1]} pixels vanish in {num_stages} stages; this network needs at least "
            f"{smallest}×{smallest}. iianet_femto is for small images."
        )
    return list(zip(*sides))


@torch.fx.wrap
def _large_enough(images: Tensor, padding: int, pool: bool, num_stages: int) -> Tensor:
    """The images as they are, or an error if they vanish."""
    _grids((images.shape[-2], images.shape[-1]), padding, pool, num_stages)
    return images


default_cfgs = generate_default_cfgs(
    {
        "iianet_femto": cfg(input_size=(3, 32, 32), pool_size=(4, 4), first_conv="stem.0"),
        "iianet_tiny": cfg(pool_size=(6, 6), first_conv="stem.0"),
        "iianet_base": cfg(input_size=(3, 299, 299), pool_size=(9, 9), crop_pct=0.95, first_conv="stem.0"),
    }
)


@register_model
def iianet_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels: three stages of 64, 96 and 128 channels, 2-pixel cells first."""
    sizes = {"img_size": 32, "stem": (24, 48), "stem_padding": 1, "stem_pool": False, "drop_rate": 0.0}
    sizes |= {"widths": ((8,), (12,), (16, 16)), "num_heads": (1, 1, 2)}
    return create(IIANet, "iianet_femto", pretrained, sizes, kwargs, (0, 1, 2))


@register_model
def iianet_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """Half of every width of the published network; a size of ours, for 224 pixels."""
    widths = ((10, 12), (16, 18, 20), (28, 40, 40, 44, 48), (64, 80))
    sizes = {"img_size": 224, "stem": (16, 32), "widths": widths, "drop_rate": 0.2}
    return create(IIANet, "iianet_tiny", pretrained, sizes, kwargs)


@register_model
def iianet_base(pretrained: bool = False, **kwargs: Any) -> Any:
    """The published network, for 299 pixels: stages of 192, 320, 768 and 1,280 channels."""
    return create(IIANet, "iianet_base", pretrained, {}, kwargs)
