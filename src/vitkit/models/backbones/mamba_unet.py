"""A U-Net of scans: VMamba's blocks down to a coarse map and up again, for an answer at every pixel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown
from vitkit.models.backbones.contract import Backbone, cfg, create, init_weights
from vitkit.models.backbones.pyramid import Stage, State
from vitkit.models.backbones.vmamba import PatchMerging, vss_block, whole_patches
from vitkit.models.cross_ssm import GatedFusion
from vitkit.models.scan_order import CROSS
from vitkit.models.ssm import own_names

__all__ = ["MambaUNet", "PatchExpanding", "SkipFusion"]

# B batch · C channels · H×W map · K classes

SKIPS = ("concat", "add", "gate")

# one node of a torch.fx graph here, too
torch.fx.wrap("whole_patches")


class UNetState(NamedTuple):
    """What walks through the stages.

    Attributes: inner: the map and auxiliary losses. skips: maps of the encoder that still wait, finest first.
    """

    inner: State
    skips: tuple[Tensor, ...]


class PatchExpanding(nn.Module):
    """A cell becomes s×s cells: linear to s²C', the channels laid out in space, LayerNorm; the inverse of merging.

    Shape: (B, C, H, W) → (B, C', sH, sW).
    """

    def __init__(self, in_chans: int, out_chans: int, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.expansion = nn.Conv2d(in_chans, scale**2 * out_chans, 1, bias=False)
        self.norm = LayerNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.pixel_shuffle(self.expansion(x), self.scale))


class SkipFusion(nn.Module):
    """Joins a decoder's map with the encoder's map of its size.

    "concat": ``W [x; skip]`` (Mamba-UNet); "add": ``x + skip`` (VM-UNet); "gate":
    ``g ⊙ x + (1 − g) ⊙ skip`` with ``g = σ(W [x; skip])`` (:class:`~vitkit.models.cross_ssm.GatedFusion`).

    Args:
        dim: C. how: "concat", "add" or "gate".

    Shape: x, skip (B, C, H, W) → (B, C, H, W).
    Raises: UnknownName for another way.
    """

    def __init__(self, dim: int, how: str = "concat") -> None:
        super().__init__()
        if how not in SKIPS:
            raise unknown("skip fusion", how, SKIPS, "vitkit show mamba-unet")
        self.how = how
        self.proj = nn.Conv2d(2 * dim, dim, 1) if how == "concat" else None
        self.gate = GatedFusion(dim) if how == "gate" else None

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.proj is not None:
            return self.proj(torch.cat([x, skip], 1))
        if self.gate is not None:
            return self.gate(x.movedim(1, -1), skip.movedim(1, -1)).movedim(-1, 1)
        return x + skip


@register_notrace_module  # reason: adds to the maps that wait
class Encode(nn.Module):
    """A stage of the encoder; all but the last leave their map for the decoder."""

    def __init__(self, stage: Stage, leaves: bool) -> None:
        super().__init__()
        self.stage, self.leaves = stage, leaves

    def forward(self, state: UNetState) -> UNetState:
        inner = self.stage(state.inner)
        return UNetState(inner, (*state.skips, inner.map) if self.leaves else state.skips)


@register_notrace_module  # reason: takes from the maps that wait
class Decode(nn.Module):
    """A stage of the decoder: expanding, fusion with the finest map that waits, blocks."""

    def __init__(self, up: nn.Module, fuse: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.up, self.fuse, self.stage = up, fuse, Stage(blocks)

    def forward(self, state: UNetState) -> UNetState:
        skip = state.skips[-1]
        # merging had filled odd sides up
        x = self.up(state.inner.map)[..., : skip.shape[2], : skip.shape[3]]
        inner = self.stage(state.inner._replace(map=self.fuse(x, skip)))
        return UNetState(inner, state.skips[:-1])


@register_notrace_module  # reason: as the other stages
class Expand(nn.Module):
    """The end of the decoder: from its finest map to the pixels."""

    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.up = up

    def forward(self, state: UNetState) -> UNetState:
        return state._replace(inner=state.inner._replace(map=self.up(state.inner.map)))


class MambaUNet(Backbone):
    """Encoder of VSS blocks with patch merging, decoder of VSS blocks with patch expanding and skips, features a pixel.

    Blocks are ``x ← x + SS2D(LN(x))`` as in :class:`~vitkit.models.backbones.vmamba.VMamba`. :meth:`forward_features`
    gives a map of the image's own size; one linear head reads it: :meth:`forward_pixels` at every pixel, ``forward`` at
    their mean. So the logits of an image are the mean of those of its pixels. timm's stages, and what
    ``features_only`` gives, are the encoder's.

    >>> net = MambaUNet(img_size=16, in_chans=2, num_classes=3, dims=(8, 16), depths=(1, 1), decoder_depths=(1,))
    >>> net(torch.zeros(1, 2, 16, 16)).shape, net.forward_pixels(torch.zeros(1, 2, 16, 16)).shape
    (torch.Size([1, 3]), torch.Size([1, 3, 16, 16]))

    Args:
        img_size: (H, W) or a side: the paths of its maps are kept ready; every other size works too.
        in_chans, num_classes, global_pool ("avg", ""), drop_rate: as in timm.
        dims, depths: widths and blocks of the encoder's stages, at least two. The last one's blocks are those at the
            coarsest map, of which VM-UNet counts half to its decoder.
        decoder_depths: blocks of the decoder's stages, coarse to fine, one fewer; None: those of the encoder backwards.
        patch: side of a patch in pixels.
        skip: "concat", "add" or "gate", see :class:`SkipFusion`.
        orders, expand, d_state: of :class:`~vitkit.models.parts.mixers.ss2d.SS2D`.
        drop_path_rate: stochastic depth, growing linearly from the first block to the last one of the encoder and
            falling again in the decoder.

    Shape: (B, C, H, W) → (B, num_classes).
    Raises: BadInput if a side of the image is no multiple of ``patch``, or the numbers of stages do not fit.
        UnknownName for another ``skip``.
    Paper: VM-UNet: Vision Mamba UNet for Medical Image Segmentation, arXiv:2402.02491, with the skips of Mamba-UNet,
        arXiv:2402.05079, by default; one of the networks of Vision Mamba in Remote Sensing, arXiv:2505.00630.
    Departs from the paper: classification is ours; in place of pretrained weights from VMamba it starts fresh. The
        "femto" size is ours.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 2, 4),
        decoder_depths: tuple[int, ...] | None = None,
        patch: int = 4,
        skip: str = "concat",
        orders: tuple[str, ...] | str = CROSS,
        expand: float = 2,
        d_state: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        up_depths = tuple(depths[-2::-1]) if decoder_depths is None else tuple(decoder_depths)
        if len(dims) < 2 or len(depths) != len(dims) or len(up_depths) != len(dims) - 1:
            raise BadInput(
                f"MambaUNet: dims={tuple(dims)}, depths={tuple(depths)} and decoder_depths={up_depths} do not fit: the "
                "decoder has one stage fewer than the encoder, which has at least two."
            )
        size = to_2tuple(img_size)
        grids = [(size[0] // patch, size[1] // patch)]
        for _ in dims[1:]:
            grids.append(((grids[-1][0] + 1) // 2, (grids[-1][1] + 1) // 2))
        if min(grids[0]) < 1:
            raise BadInput(f"img_size={size} is smaller than a patch of {patch} pixels; give at least {patch}.")
        down_rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        up_rates: Any = calculate_drop_path_rates(drop_path_rate, list(up_depths[::-1]), stagewise=True)
        options: dict[str, Any] = {"orders": orders, "expand": expand, "d_state": d_state}
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], patch, stride=patch), LayerNorm2d(dims[0]))
        stages: list[nn.Module] = []
        for i, (dim, grid) in enumerate(zip(dims, grids)):
            blocks = [vss_block(dim, grid=grid, drop_path=rate, **options) for rate in down_rates[i]]
            stage = Stage(blocks, PatchMerging(dims[i - 1], dim) if i else None)
            stages.append(Encode(stage, leaves=i < len(dims) - 1))
        self.stages = nn.ModuleList(stages)
        decoder: list[nn.Module] = []
        for i in range(len(dims) - 2, -1, -1):
            # the finest stage has the smallest rates
            blocks = [vss_block(dims[i], grid=grids[i], drop_path=rate, **options) for rate in up_rates[i][::-1]]
            decoder.append(Decode(PatchExpanding(dims[i + 1], dims[i]), SkipFusion(dims[i], skip), blocks))
        self.decoder = nn.ModuleList([*decoder, Expand(PatchExpanding(dims[0], dims[0], patch))])
        reductions = [patch * 2**i for i in range(len(dims))]
        self.finish_init(list(dims), reductions, num_classes, in_chans, global_pool, drop_rate, num_features=dims[0])
        self.patch = patch
        gates = {id(module.gate) for module in self.modules() if isinstance(module, GatedFusion)}
        for module in self.modules():
            # the depthwise convolutions keep PyTorch's own start, as in VMamba, and gates are even at first
            if isinstance(module, nn.Linear) and id(module) not in gates:
                init_weights(module)

    # -- the contract of a backbone -------------------------------------------------------------------------------

    def begin(self, images: Tensor) -> UNetState:
        x = self.stem(whole_patches(images, self.patch))
        return UNetState(State(x, None, self.aux_sink if self.aux_sink is not None else {}), ())

    def as_map(self, state: UNetState) -> Tensor:
        return state.inner.map

    def features(self, state: UNetState) -> Tensor:
        """The decoder: what the encoder left → (B, C, H, W) at the size of the image, normalised."""
        for stage in self.decoder:
            state = self.step(stage, state)
        return state.inner.map

    def _normed_map(self, state: UNetState) -> Tensor:
        # the norm stands behind the decoder
        return self.as_map(state)

    def forward_pixels(self, images: Tensor) -> Tensor:
        """Logits of every pixel, (B, C, H, W) → (B, K, H, W); without a classifier its features."""
        features = self.head_drop(self.forward_features(images).movedim(1, -1))
        return cast(Tensor, self.head(features)).movedim(-1, 1)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the encoder's stages behind the last one of ``indices``, the whole decoder, and the head."""
        self.decoder = nn.ModuleList()
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer-wise learning rates; the decoder is one with the head."""
        return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^decoder", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Those of the state-space layers too; see :class:`~vitkit.models.ssm.SelectiveSSM`."""
        return super().no_weight_decay() | own_names(self)


default_cfgs = generate_default_cfgs(
    {
        "mamba_unet_femto": cfg(input_size=(3, 32, 32), pool_size=(32, 32), first_conv="stem.0"),
        "mamba_unet_tiny": cfg(pool_size=(224, 224), first_conv="stem.0"),
    }
)


@register_model
def mamba_unet_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels: dims 32/64/128, one block a stage, patches of 2 pixels, 8 states."""
    sizes = {"img_size": 32, "dims": (32, 64, 128), "depths": (1, 1, 1), "patch": 2, "d_state": 8}
    return create(MambaUNet, "mamba_unet_femto", pretrained, sizes, kwargs, (0, 1, 2))


@register_model
def mamba_unet_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """VM-UNet's size: dims 96 to 768, 2/2/2 blocks down, 4 at the coarsest map, 2/2/1 up, patches of 4 pixels."""
    sizes = {"depths": (2, 2, 2, 4), "decoder_depths": (2, 2, 1)}
    return create(MambaUNet, "mamba_unet_tiny", pretrained, sizes, kwargs, (0, 1, 2, 3))
