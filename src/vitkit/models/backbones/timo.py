"""TiMo: a pyramid for series of satellite images whose attention joins a token's own date and its own place."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import cfg, create, init_weights
from vitkit.models.backbones.pyramid import Halve, MapBlock, Pyramid, Stage, State, TokenBlock
from vitkit.models.cells import as_tokens
from vitkit.models.parts.mixers.stga import STGA
from vitkit.models.sincos import sincos_clip
from vitkit.models.vit import Attention, Block, Mlp

__all__ = ["TiMo", "cut_units", "join_units"]

# B series · T dates · c channels of an image · C of a stage · H×W map · U units · V visible ones · s cells a side

#: "joint": all tokens of all dates see each other
StageAttention = Literal["diff", "full", "joint"]
Fuse = Literal["mean", "concat"]

_STEM_STRIDE = 4


class PerFrame(nn.Module):
    """A module on maps for every frame by itself: (B, C, T, H, W) → (B, C', T, H', W'); a map alone goes through it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self.module(x)
        return self.module(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class TiMo(Pyramid):
    """Convolutional stem, four stages of attention over space and time, 3×3 convolutions of stride 2 between them.

    Stem of every frame: 7×7 convolution of stride 2, BatchNorm, ReLU, 2×2 convolution of stride 2, LayerNorm. Positions
    are fixed: half the channels code the date, half row and column. The first stages have the gyroscope attention
    :class:`~vitkit.models.parts.mixers.stga.STGA`, the later ones attention over all dates and places; blocks are
    pre-norm with MLP, and a LayerNorm ends each stage. The classifier reads the mean over dates and places.

    One image is a series of one date, on which the gyroscope attention is ordinary attention. A series is
    (B, T·c, H, W), its dates one after another on the channel axis, or (B, T, c, H, W) with any T. ``dates`` (B, T)
    are numbers in one unit, such as days since the first; without them they are 0, 1, …

    >>> net = TiMo(in_chans=6, frames=3, num_classes=4, dims=(8, 16), depths=(1, 1), num_heads=(1, 2),
    ...            attention=("diff", "joint")).eval()
    >>> clip = torch.rand(2, 3, 2, 16, 16)
    >>> torch.allclose(net(clip), net(clip.flatten(1, 2)))
    True
    >>> net(clip, dates=torch.tensor([[0.0, 12.0, 41.0], [0.0, 5.0, 10.0]])).shape
    torch.Size([2, 4])
    >>> [m.shape for m in net.forward_intermediates(clip, intermediates_only=True)]
    [torch.Size([2, 8, 4, 4]), torch.Size([2, 16, 2, 2])]

    Args:
        img_size: accepted as timm gives it; all sizes from 4 pixels on work.
        in_chans: channels of the images, T·c. num_classes, global_pool ("avg", ""), drop_rate: as in timm.
        frames: T, into which the channel axis is cut. Default 1.
        dims, depths, num_heads: of the stages.
        attention: of each stage: "diff" (by medians), "full" gyroscope attention, or "joint" (all dates and places).
        mlp_ratio: of the MLPs.
        fuse_frames: the maps of :meth:`forward_intermediates` and ``features_only`` are the "mean" over the dates, or
            the dates one after another on the channel axis ("concat").
        drop_path_rate: stochastic depth of the last block, growing linearly.

    Shape: (B, T·c, H, W) or (B, T, c, H, W) → (B, num_classes).
    Raises: BadInput if T does not divide the channels, the images have others or are smaller than 4 pixels, there are
        not as many dates as frames, or an option is out of range.
    Paper: TiMo: Spatiotemporal Foundation Model for Satellite Image Time Series, arXiv:2505.08723.
    Departs from the paper: attention logits are scaled; what to classify is read from the mean over dates and places.
        Masks of missing or cloudy dates, readers of image stacks and the UPerNet decoder are not here. The sizes
        "femto" and "tiny" are ours.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        frames: int = 1,
        dims: tuple[int, ...] = (128, 256, 512, 1024),
        depths: tuple[int, ...] = (2, 2, 18, 2),
        num_heads: tuple[int, ...] = (4, 8, 16, 32),
        attention: tuple[StageAttention, ...] = ("diff", "diff", "joint", "joint"),
        mlp_ratio: float = 4.0,
        fuse_frames: Fuse = "mean",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        del img_size
        if frames < 1 or in_chans % frames:
            fits = max(d for d in range(1, max(1, frames) + 1) if in_chans % d == 0)
            raise BadInput(
                f"frames={frames} does not divide the {in_chans} channels of the images into dates of equal size; "
                f"frames={fits} would."
            )
        known = get_args(StageAttention)
        if isinstance(attention, str) or len(attention) != len(dims) or not set(attention) <= set(known):
            raise BadInput(
                f"attention={attention!r} must name one of {known} for each of the {len(dims)} stages, such as "
                f"{('diff', 'diff', *['joint'] * len(dims))[: len(dims)]}."
            )
        if fuse_frames not in get_args(Fuse):
            raise BadInput(f"fuse_frames={fuse_frames!r} is not known; use 'mean' or 'concat'.")
        if not len(dims) == len(depths) == len(num_heads):
            raise BadInput(f"TiMo: dims={dims}, depths={depths} and num_heads={num_heads} must name as many stages.")
        if dims[0] % 8 or any(dim % heads for dim, heads in zip(dims, num_heads)):
            raise BadInput(
                f"TiMo: the first of dims={tuple(dims)} must be a multiple of 8, for the codes of dates and places, "
                f"and num_heads={tuple(num_heads)} must divide the widths."
            )
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, heads, kind) in enumerate(zip(dims, num_heads, attention)):
            blocks: list[nn.Module] = []
            for j in range(depths[i]):
                block = Block(
                    dim,
                    heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=True,
                    drop_path=rates[i][j],
                    norm_layer=partial(nn.LayerNorm, eps=1e-6),
                    attn_layer=Attention if kind == "joint" else STGA,
                    mlp_layer=Mlp,
                    depth=sum(depths[:i]) + j,
                )
                if isinstance(block.attn, STGA):
                    block.attn.set_variant("diff" if kind == "diff" else "full")
                blocks.append(TokenBlock(block))
            down = PerFrame(nn.Sequential(Halve(dims[i - 1], dim), LayerNorm2d(dim))) if i else None
            stages.append(Stage([*blocks, MapBlock(PerFrame(LayerNorm2d(dim)))], down))
        stem = nn.Sequential(
            nn.Conv2d(in_chans // frames, dims[0], 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(dims[0]),
            nn.ReLU(),
            nn.Conv2d(dims[0], dims[0], 2, stride=2),
            LayerNorm2d(dims[0]),
        )
        super().__init__(
            PerFrame(stem),
            stages,
            list(dims),
            [_STEM_STRIDE * 2**i for i in range(len(dims))],
            nn.Identity(),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.frames, self.fuse_frames = frames, fuse_frames
        if fuse_frames == "concat":
            for info in self.feature_info:
                info["num_chs"] *= frames
        self.apply(init_weights)

    @property
    def stride(self) -> int:
        """Pixels a side of a cell of the last stage."""
        return self.feature_info[-1]["reduction"]

    # -- timm's way -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, dates: Tensor | None = None) -> Tensor:
        return self.forward_head(self.forward_features(x, dates))

    def forward_features(self, x: Any, dates: Tensor | None = None) -> Tensor:
        """Images → (B, C, H, W) of the last stage, the mean over dates."""
        return super().forward_features((x, dates))  # type: ignore[arg-type]

    def forward_intermediates(self, x: Any, *args: Any, dates: Tensor | None = None, **kwargs: Any) -> Any:
        """Maps of the stages, see :meth:`Backbone.forward_intermediates`; each has passed the norm of its stage."""
        return super().forward_intermediates((x, dates), *args, **kwargs)  # type: ignore[arg-type]

    def begin(self, images: Any) -> State:
        """Stem and positions; ``images`` are a tensor, or a pair of it and its dates."""
        images, dates = images if isinstance(images, tuple) else (images, None)
        clip = self.as_clip(images)
        if self.fuse_frames == "concat" and clip.shape[1] != self.frames:
            raise BadInput(
                f"fuse_frames='concat' is for series of frames={self.frames} dates, not {clip.shape[1]}; use 'mean'."
            )
        return State(self.embed(clip, dates), None, self.aux_sink if self.aux_sink is not None else {})

    def as_map(self, state: State) -> Tensor:
        return state.map.mean(2) if self.fuse_frames == "mean" else state.map.transpose(1, 2).flatten(1, 2)

    def _normed_map(self, state: State) -> Tensor:
        return self.as_map(state)

    def features(self, state: State) -> Tensor:
        return state.map.mean(2)

    # -- its parts, for pretraining ---------------------------------------------------------------------------------

    def as_clip(self, images: Tensor) -> Tensor:
        """(B, T·c, H, W) or (B, T, c, H, W) → (B, T, c, H, W)."""
        chans = self.in_chans // self.frames
        fits = images.shape[1] == self.in_chans if images.ndim == 4 else images.ndim == 5 and images.shape[2] == chans
        if not fits or min(images.shape) < 1 or min(images.shape[-2:]) < _STEM_STRIDE:
            raise BadInput(
                f"This TiMo takes images (B, {self.in_chans}, H, W), or (B, T, {chans}, H, W), of at least "
                f"{_STEM_STRIDE}×{_STEM_STRIDE} pixels, not {tuple(images.shape)}; make one with in_chans=… and "
                "frames=… of your data."
            )
        return images if images.ndim == 5 else images.unflatten(1, (self.frames, chans))

    def embed(self, clip: Tensor, dates: Tensor | None = None) -> Tensor:
        """Stem and positions: (B, T, c, H, W) and (B, T) or None → (B, C, T, h, w)."""
        if dates is None:
            dates = torch.arange(clip.shape[1], device=clip.device).unsqueeze(0)
        elif dates.shape != clip.shape[:2]:
            raise BadInput(
                f"dates has shape {tuple(dates.shape)}, but this series needs one a frame: {tuple(clip.shape[:2])}."
            )
        x = self.stem(clip.transpose(1, 2))
        codes = sincos_clip(dates.to(clip.device), (x.shape[3], x.shape[4]), x.shape[1])
        return x + codes.transpose(-2, -1).transpose(1, 2).reshape(-1, *x.shape[1:]).to(x.dtype)

    def encode_units(self, clip: Tensor, visible: Tensor, unit: int, dates: Tensor | None = None) -> Tensor:
        """Encode the visible units of a series: only their tokens pass the stages, and all of them see each other.

        The stem sees whole frames whose hidden units are zero. Then each visible unit is a map of its own, so that no
        convolution between the stages reaches out of it; attention is over all tokens of all visible units, since each
        frame hides other units and the gyroscope's two axes have gaps.

        Args:
            clip: (B, T, c, H, W), normalised, H and W multiples of ``unit``.
            visible: (B, V) units, counted date by date in raster order. unit: side in pixels, a multiple of ``stride``.
            dates: (B, T) or None.

        Returns: (B, V·s², C), s = unit/stride cells a side; the cells of a unit in raster order.
        """
        (height, width), dates_t = clip.shape[-2:], clip.shape[1]
        grid = (height // unit, width // unit)
        shown = torch.zeros(len(clip), dates_t * grid[0] * grid[1], dtype=torch.bool, device=clip.device)
        shown = shown.scatter(1, visible, True).view(len(clip), dates_t, 1, *grid)
        # chosen, not multiplied: a hidden NaN is hidden too
        clip = torch.where(shown.repeat_interleave(unit, 3).repeat_interleave(unit, 4), clip, clip.new_zeros(()))
        units = cut_units(self.embed(clip, dates), unit // _STEM_STRIDE)
        units = units.gather(1, visible[:, :, None, None, None].expand(-1, -1, *units.shape[2:])).transpose(1, 2)
        for stage in self.stages:
            units = self.step(partial(_inside_units, stage), units)  # type: ignore[arg-type]
        return as_tokens(units)


def _inside_units(stage: Stage, units: Tensor) -> Tensor:
    """One stage on units (B, C, V, s, s)."""
    units = stage.down(units)
    # side by side they are one map, on which every attention is over all tokens
    state = State(units.flatten(2, 3), None, {})
    for block in stage.blocks:
        state = block(state)
    return state.map.unflatten(2, units.shape[2:4])


def cut_units(maps: Tensor, side: int) -> Tensor:
    """(B, C, T, H, W) → (B, U, C, side, side): the U = T·(H/side)·(W/side) squares, date by date in raster order."""
    cut = maps.unflatten(4, (-1, side)).unflatten(3, (-1, side))
    return cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(1, 3)


def join_units(units: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`cut_units` for a grid of (T, H/side, W/side) units."""
    joined = units.unflatten(1, grid).permute(0, 4, 1, 2, 5, 3, 6)
    return joined.flatten(5, 6).flatten(3, 4)


default_cfgs = generate_default_cfgs(
    {
        "timo_femto": cfg(input_size=(3, 32, 32), pool_size=(2, 2), first_conv="stem.module.0"),
        "timo_tiny": cfg(first_conv="stem.module.0"),
        "timo_base": cfg(first_conv="stem.module.0"),
        "timo_large": cfg(first_conv="stem.module.0"),
    }
)


@register_model
def timo_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For 28 to 64 pixels: dims 48/96/192, 1/1/2 blocks, 16-pixel cells last."""
    sizes = {"dims": (48, 96, 192), "depths": (1, 1, 2), "num_heads": (2, 4, 6), "mlp_ratio": 2.0}
    return create(TiMo, "timo_femto", pretrained, {**sizes, "attention": ("diff", "diff", "joint")}, kwargs, (0, 1, 2))


@register_model
def timo_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """dims 64/128/256/512, 2/2/6/2 blocks."""
    sizes = {"dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "num_heads": (2, 4, 8, 16)}
    return create(TiMo, "timo_tiny", pretrained, sizes, kwargs)


@register_model
def timo_base(pretrained: bool = False, **kwargs: Any) -> Any:
    """The paper's base size: dims 128/256/512/1024, 2/2/18/2 blocks."""
    return create(TiMo, "timo_base", pretrained, {}, kwargs)


@register_model
def timo_large(pretrained: bool = False, **kwargs: Any) -> Any:
    """The paper's large size: dims 384/768/960/1536, 2/2/18/2 blocks."""
    sizes = {"dims": (384, 768, 960, 1536), "num_heads": (6, 12, 24, 48)}
    return create(TiMo, "timo_large", pretrained, sizes, kwargs)
