"""Reslim: fields of several variables in, the wanted ones out at a higher resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown
from vitkit.models.backbones.reslim import SIZES, ReslimEncoder

# B batch · V variables · K targets · H×W cells · m scale · p patch · D width

STATIC = ("land_sea_mask", "orography", "latitude", "land_cover")


class Reslim(nn.Module):
    """Residual slim ViT for downscaling: a ViT at low resolution plus a light convolutional path that upsamples.

    ``ŷ = Conv₃ₓ₃(Unpatchify(Decoder(Encoder(x, r)))) + Residual(x_targets, x_static)``. The encoder is a
    :class:`~vitkit.models.backbones.reslim.ReslimEncoder`; the decoder is ``decoder_depth`` × (Linear, GELU) and a
    Linear to K·(m p)² values per token; the residual path is Conv₃ₓ₃ to ``cnn_ratio``·m² channels, GELU,
    PixelShuffle(m) and Conv₃ₓ₃ to K.

    Fields should be standardised per variable. At inference any variables may be missing but those the residual path
    reads: ``model(fields, variables=["t2m", "orography"])``. Paper's training: AdamW, lr 2e-3 (5e-4 from 117M), weight
    decay 1e-5, β = (0.9, 0.99), 100 epochs, 2 of them warm-up.

    Args:
        variables: names of the V input channels.
        targets: names of the K output channels, each among ``variables``.
        static: names of fields that the residual path sees beside the targets; each among ``variables``. None: those
            of :data:`STATIC` that are there.
        scale: m. img_size: (H, W) of the low-resolution fields in training.
        patch_size: p. embed_dim, depth, num_heads, mlp_ratio: of the encoder; ``size=`` of :func:`reslim` sets them.
        decoder_depth: hidden layers of the decoder. cnn_ratio: channels of the residual path per output cell.
        drop: dropout of positions, attention and projections. drop_path: stochastic depth of the last block.
        residual: False leaves the residual path out, for comparisons.
        weight_init: "": normal(0, 0.02) as in the paper; "jax": Xavier, for small widths.

    Shape: fields (B, V, H, W) → (B, K, m·H, m·W).
    Raises: UnknownName or BadInput if a target or static field is no variable, or is missing in a call; BadInput if the
        fields do not divide into patches or the number of channels is another.
    Paper: ORBIT-2: Scaling Exascale Vision Foundation Models for Weather and Climate Downscaling, arXiv:2505.04802.
    Departs from the paper: see the encoder. Fields that do not divide into patches are refused, where the authors'
        code cuts them. Values within an output patch are ordered as PixelShuffle does. The last convolution starts
        without bias.
    """

    def __init__(
        self,
        variables: Sequence[str],
        targets: Sequence[str],
        static: Sequence[str] | None = None,
        scale: int = 4,
        img_size: int | tuple[int, int] = (32, 64),
        patch_size: int = 2,
        embed_dim: int = 256,
        depth: int = 6,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        decoder_depth: int = 4,
        cnn_ratio: int = 4,
        drop: float = 0.1,
        drop_path: float = 0.1,
        residual: bool = True,
        weight_init: str = "",
    ) -> None:
        super().__init__()
        self.variables, self.targets = tuple(variables), tuple(targets)
        self.static = tuple(name for name in STATIC if name in self.variables) if static is None else tuple(static)
        for name in (*self.targets, *self.static):
            if name not in self.variables:
                raise unknown("variable", name, self.variables, "variables")
        if not self.targets or len(set(self.targets)) != len(self.targets) or scale < 1 or decoder_depth < 0:
            raise BadInput(
                f"targets={list(self.targets)} must name at least one variable and none twice, scale={scale} must be "
                f"at least 1 and decoder_depth={decoder_depth} at least 0."
            )
        self.scale, self.patch_size = scale, patch_size
        self.encoder = ReslimEncoder(
            img_size=to_2tuple(img_size),
            in_chans=len(self.variables),
            num_classes=0,
            variables=self.variables,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            pos_drop_rate=drop,
            proj_drop_rate=drop,
            attn_drop_rate=drop,
            drop_path_rate=drop_path,
            weight_init=weight_init,
        )
        num_targets = len(self.targets)
        hidden = [layer for _ in range(decoder_depth) for layer in (nn.Linear(embed_dim, embed_dim), nn.GELU())]
        self.decoder = nn.Sequential(*hidden, nn.Linear(embed_dim, num_targets * (scale * patch_size) ** 2))
        for layer in self.decoder:
            if isinstance(layer, nn.Linear):
                if weight_init:
                    nn.init.xavier_uniform_(layer.weight)
                else:
                    nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.conv_out = nn.Conv2d(num_targets, num_targets, 3, padding=1)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]
        self.residual: nn.Module | None = None
        if residual:
            self.residual = nn.Sequential(
                nn.Conv2d(num_targets + len(self.static), cnn_ratio * scale**2, 3, padding=1),
                nn.GELU(),
                nn.PixelShuffle(scale),
                nn.Conv2d(cnn_ratio, num_targets, 3, padding=1),
            )

    def forward(
        self, fields: Tensor, resolution: float | Tensor | None = None, variables: Sequence[str] | None = None
    ) -> Tensor:
        """Fields → targets at m times the resolution.

        Args:
            fields: (B, V', H, W), one channel for each of ``variables``.
            resolution: km per cell, one number or (B,); None counts as 0, so train with or without it throughout.
            variables: names of the channels in their order; None: all.
        """
        names = self.variables if variables is None else tuple(variables)
        if fields.ndim != 4 or fields.shape[1] != len(names):
            raise BadInput(
                f"Fields of shape {tuple(fields.shape)} do not fit the {len(names)} variables {', '.join(names)}; give "
                "(B, variables, H, W)."
            )
        x, layout = self.encoder.embed(fields, variables=names, resolution=resolution)
        x, layout = self.encoder.run(x, layout)
        cells = layout.to_grid(self.decoder(self.encoder.norm(x)))
        out = self.conv_out(F.pixel_shuffle(cells, self.scale * self.patch_size))
        if self.residual is None:
            return out
        return out + self.residual(fields[:, self._residual_channels(names)])

    def _residual_channels(self, names: tuple[str, ...]) -> list[int]:
        wanted = (*self.targets, *self.static)
        absent = [name for name in wanted if name not in names]
        if absent:
            raise BadInput(
                f"Reslim's residual path reads {', '.join(wanted)}, and {', '.join(absent)} are not among the fields "
                "given; every other variable may be missing."
            )
        return [names.index(name) for name in wanted]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's blocks in the backward pass instead of keeping their activations."""
        self.encoder.set_grad_checkpointing(enable)


def reslim(variables: Sequence[str], targets: Sequence[str], size: str = "8m", **options: Any) -> Reslim:
    """A :class:`Reslim` of one of the paper's sizes.

    >>> import torch
    >>> model = reslim(["t2m", "orography"], ["t2m"], size="femto", img_size=8)
    >>> model(torch.zeros(1, 2, 8, 8), resolution=111.0).shape
    torch.Size([1, 1, 32, 32])

    Args:
        variables, targets: see :class:`Reslim`.
        size: "8m", "117m", "1b", "10b", or "femto" for small experiments. The names are the paper's; the published
            configuration of "8m" has 5.5 M weights with 23 variables and 3 targets.
        options: arguments of :class:`Reslim` that replace the size's.

    Raises: UnknownName for another size; and what :class:`Reslim` raises.
    """
    if size not in SIZES:
        raise unknown("size of Reslim", size, SIZES, "vitkit.models.backbones.reslim.SIZES")
    small = {"decoder_depth": 2, "drop": 0.0, "drop_path": 0.0} if size == "femto" else {}
    return Reslim(variables, targets, **{**SIZES[size], **small, **options})
