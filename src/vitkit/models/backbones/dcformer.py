"""DCFormer: a pyramid of decomposed convolutions for volumes and images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import cfg, create, init_weights
from vitkit.models.backbones.pyramid import MapBlock, Pyramid, Stage, State, from_tokens, to_tokens
from vitkit.models.cosine_codebook import CosineCodebook
from vitkit.models.decomposed_conv import CONVS, DecompBlock, DecompConv, check_dims
from vitkit.models.vit import Attention, Mlp, call

__all__ = ["DCFormer"]

# B batch · C channels · D×H×W volume, or H×W image

# it asks for the size of the map, which torch.fx cannot
register_notrace_module(DecompConv)

POOLS: dict[int, type[nn.MaxPool2d] | type[nn.MaxPool3d]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


class PositionedBlock(nn.Module):
    """Pre-norm attention, then MLP, over all cells, each behind a decomposed depthwise 3-cell convolution.

    ``x ← x + conv(x)``, ``x ← x + attn(LN(x))``, ``x ← x + conv'(x)``, ``x ← x + MLP(LN(x))``. The convolutions,
    without batch norm, tell the tokens where they are.

    Args:
        dim: C. num_heads: of the attention. dims: axes of the map. mlp_ratio: hidden width of the MLP over C.
        drop_path: stochastic depth. depth: index of the block.

    Shape: State with a map (B, C, n₁, …, n_d) → the same.
    """

    def __init__(
        self, dim: int, num_heads: int, dims: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, depth: int = 0
    ) -> None:
        super().__init__()
        self.positions = nn.ModuleList(
            DecompConv(dim, dim, 3, groups=dim, dims=dims, norm=False) for _ in ("attention", "MLP")
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, depth=depth)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, state: State) -> State:
        for position, norm, layer in zip(self.positions, (self.norm1, self.norm2), (self.attn, self.mlp)):
            state = state._replace(map=state.map + position(state.map))
            x, layout = to_tokens(state)
            state = from_tokens(x + self.drop_path(call(layer, norm(x), layout)), layout, state)
        return state


class DCFormer(Pyramid):
    """Network of decomposed convolutions: a stem, then stages of pooling, 1×1 convolution and blocks.

    Stem: ``DecompConv(7, stride)``, GELU, three times ``DecompConv(3)``, GELU. Each stage: 3-cell max-pooling of stride
    2, 1×1 convolution to its channels, then blocks ``x + γ · MLP(DWDecompConv(x))``. The classifier reads the mean over
    all cells; with ``num_classes=512`` that is the paper's projection for image–text training. ``dims=3`` is the
    published network for volumes, ``dims=2`` the same for images. Maps of volumes have five axes everywhere, in
    ``forward_intermediates`` and ``features_only`` too.

    >>> import timm, torch
    >>> net = timm.create_model("dcformer_nano", num_classes=0).eval()
    >>> net(torch.rand(1, 1, 64, 96, 96)).shape, net.forward_features(torch.rand(1, 1, 64, 96, 128)).shape
    (torch.Size([1, 256]), torch.Size([1, 256, 1, 2, 2]))

    Args:
        img_size: accepted as timm gives it; any size works.
        in_chans: C of the images; with ``slices=D`` they are D slices of in_chans/D channels.
        num_classes, global_pool ("avg", ""), drop_rate: as in timm.
        dims: 2 for images (B, C, H, W), 3 for volumes.
        slices: D; for ``dims=3``, the channel axis of images (B, in_chans, H, W) is cut into D slices, the channels of
            the first slice first. Default 1.
        stem: channels of the stem. widths, depths, kernels: channels, blocks and kernel size of the stages.
        types: a letter a stage, "C" for decomposed-convolution blocks, "T" for attention with decomposed-convolution
            positions. Default all "C".
        num_heads: of attention in "T" stages.
        stem_stride: of the first convolution.
        mlp_ratio: hidden width of the MLPs. layer_scale: first value of γ in "C" blocks.
        codes: unit vectors the last map is quantised to by a
            :class:`~vitkit.models.cosine_codebook.CosineCodebook`, 8,192 in the paper's code; training adds its
            commitment loss. Default 0: none.
        drop_path_rate: stochastic depth of the last block, growing linearly.

    Shape: (B, C, H, W), for ``dims=3`` (B, in_chans/slices, D', H, W) with any D' or (B, in_chans, H, W) →
        (B, num_classes).
    Raises: BadInput for images of other channels or axes, options of unequal lengths, or a D that does not divide
        in_chans.
    Paper: DCFormer: Efficient 3D Vision-Language Modeling with Decomposed Convolutions, arXiv:2502.05091.
    Departs from the paper: two axes, the small size and cutting channels into slices are ours. The published file gives
        the stem's GELU in the place of another argument, which leaves it out, and multiplies attention logits by √d;
        here the stem has it, and logits are divided. With these two undone, its weights give the same maps here.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 512,
        in_chans: int = 1,
        num_classes: int = 1000,
        global_pool: str | None = None,
        dims: int = 3,
        slices: int = 1,
        stem: int = 64,
        widths: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 3, 3, 2),
        kernels: Sequence[int] = (13, 11, 9, 7),
        types: str | None = None,
        num_heads: int = 8,
        stem_stride: int = 4,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        codes: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        del img_size
        check_dims(dims)
        types = "C" * len(widths) if types is None else types
        if not len(widths) == len(depths) == len(kernels) == len(types) or not set(types) <= set("CT"):
            raise BadInput(
                f"DCFormer: widths={tuple(widths)}, depths={tuple(depths)}, kernels={tuple(kernels)} and "
                f"types={types!r} need one entry a stage; types has the letters C and T."
            )
        self._check_slices(in_chans, slices, dims)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        conv = partial(DecompConv, dims=dims, act=nn.GELU)
        layers: list[nn.Module] = [conv(in_chans // slices, stem, 7, stem_stride)]
        layers += [conv(stem, stem, 3) for _ in range(3)]
        stages, before, done = [], stem, 0
        for width, depth, k, kind, drops in zip(widths, depths, kernels, types, rates):
            down = nn.Sequential(POOLS[dims](3, 2, 1), CONVS[dims](before, width, 1, bias=False))
            blocks: list[nn.Module] = []
            for i in range(depth):
                if kind == "C":
                    blocks.append(MapBlock(DecompBlock(width, k, dims, mlp_ratio, layer_scale, drops[i])))
                else:
                    blocks.append(PositionedBlock(width, num_heads, dims, mlp_ratio, drops[i], done + i))
            stages.append(Stage(blocks, down))
            before, done = width, done + depth
        super().__init__(
            nn.Sequential(*layers),
            stages,
            list(widths),
            [stem_stride * 2 ** (i + 1) for i in range(len(widths))],
            nn.Identity(),
            stem_dim=stem,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
        )
        self.dims, self.slices = dims, slices
        self.codebook = CosineCodebook(widths[-1], codes) if codes else None
        self.apply(init_weights)

    @staticmethod
    def _check_slices(in_chans: int, slices: int, dims: int) -> None:
        if dims == 2 and slices != 1:
            raise BadInput(f"DCFormer: slices={slices} cuts images into volumes, which needs dims=3.")
        if slices < 1 or in_chans % slices:
            fits = max(d for d in range(1, max(1, min(slices, in_chans)) + 1) if in_chans % d == 0)
            raise BadInput(
                f"DCFormer: slices={slices} does not cut the {in_chans} channels of the images into slices of equal "
                f"size; slices={fits} does."
            )

    def begin(self, images: Tensor) -> State:
        return super().begin(_as_cells(images, self.dims, self.in_chans, self.slices))

    def features(self, state: State) -> Tensor:
        if self.codebook is None:
            return state.map
        found, _, loss = self.codebook(state.map)
        if self.training:
            state.aux["commitment", len(self.stages)] = loss
        return found

    def pool(self, features: Tensor) -> Tensor:
        return features if self.global_pool == "" else features.flatten(2).mean(2)

    def _normed_map(self, state: State) -> Tensor:
        return self.features(state)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {n for n, _ in self.named_parameters() if n.endswith("gamma")}


@torch.fx.wrap
def _as_cells(images: Tensor, dims: int, in_chans: int, slices: int) -> Tensor:
    """Images as they are for two axes, as volumes (B, in_chans/slices, D, H, W) for three."""
    channels = in_chans // slices
    if dims == 3 and images.ndim == 4 and images.shape[1] == in_chans:
        images = images.unflatten(1, (slices, channels)).transpose(1, 2)
    if images.ndim != dims + 2 or images.shape[1] != channels:
        shapes = f"(B, {in_chans}, H, W)" + (f" or (B, {channels}, D, H, W)" if dims == 3 else "")
        raise BadInput(f"This DCFormer takes {shapes}, not {tuple(images.shape)}; see in_chans, dims and slices.")
    return images


volume_cfg = partial(cfg, input_size=(1, 512, 512), pool_size=(8, 8), mean=(0.5,), std=(0.5,), crop_pct=1.0)

default_cfgs = generate_default_cfgs(
    {
        "dcformer_femto": cfg(
            input_size=(3, 32, 32), pool_size=(2, 2), first_conv=("stem.0.branches.0.0", "stem.0.branches.1.0")
        ),
        "dcformer_nano": volume_cfg(first_conv=tuple(f"stem.0.branches.{i}.0" for i in range(3))),
        "dcformer_naive": volume_cfg(first_conv=tuple(f"stem.0.branches.{i}.0" for i in range(3))),
        "dcformer_tiny": volume_cfg(first_conv=tuple(f"stem.0.branches.{i}.0" for i in range(3))),
    }
)


@register_model
def dcformer_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels, or volumes of as many with ``dims=3``: widths 48/96/160, 1/1/2 blocks."""
    sizes: dict[str, Any] = {"in_chans": 3, "dims": 2, "stem": 32, "widths": (48, 96, 160), "depths": (1, 1, 2)}
    sizes |= {"kernels": (7, 5, 3), "stem_stride": 2}
    return create(DCFormer, "dcformer_femto", pretrained, sizes, kwargs, (0, 1, 2))


@register_model
def dcformer_nano(pretrained: bool = False, **kwargs: Any) -> Any:
    """Volumes; widths 32/64/128/256, one block each: 0.92 M parameters with the paper's projection to 512."""
    sizes = {"stem": 32, "widths": (32, 64, 128, 256), "depths": (1, 1, 1, 1)}
    return create(DCFormer, "dcformer_nano", pretrained, sizes, {"in_chans": 1, **kwargs})


@register_model
def dcformer_naive(pretrained: bool = False, **kwargs: Any) -> Any:
    """Volumes; widths 64/128/256/512, two blocks each."""
    sizes = {"stem": 32, "widths": (64, 128, 256, 512), "depths": (2, 2, 2, 2)}
    return create(DCFormer, "dcformer_naive", pretrained, sizes, {"in_chans": 1, **kwargs})


@register_model
def dcformer_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """Volumes; widths 96/192/384/768, 2/3/3/2 blocks: 15.0 M parameters with the paper's projection to 512."""
    return create(DCFormer, "dcformer_tiny", pretrained, {}, {"in_chans": 1, **kwargs})
