"""Masked autoencoding of series of images: whole squares are hidden, in every frame others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.anatomy.host import host
from vitkit.errors import BadInput
from vitkit.models.backbones.timo import TiMo, cut_units
from vitkit.models.normalized import to_model_space
from vitkit.models.sincos import sincos_clip
from vitkit.models.vit import Block, ViT, collect_aux
from vitkit.pretrain.decoder import TokenDecoder
from vitkit.pretrain.mae import num_decoder_heads, run_visible
from vitkit.pretrain.masking import random_mask
from vitkit.pretrain.patches import patchify

# B series · T frames · c channels · U units of a series · V visible ones · N cells of a series, p² pixels each


class UnitMAE(nn.Module):
    """Block-masked autoencoding: units of u×u pixels are hidden, and their normalised pixels predicted.

    Over all T frames of a series ρ of the units are hidden, in each frame others. Only visible units pass the encoder,
    each a map of its own, so that a pyramid may halve it without a look at what is hidden (see
    :meth:`~vitkit.models.backbones.timo.TiMo.encode_units`). The decoder gets one token for each of the encoder's last
    cells (a whole unit in the paper), mask tokens for hidden ones, and codes of date and place again:
    ``Σ_{n hidden} mean_pixels (pred_n − target_n)² / max(1, #hidden)``.

    Frames that units do not divide are filled up with zeros (the mean colour), which no target counts.

    Args:
        model: a :class:`~vitkit.models.backbones.timo.TiMo`, a ViT, or a wrapper around one; trained in place. In a
            plain ViT units are squares of patches of a single image.
        unit: u, side in pixels. None: of a TiMo its ``stride``, 32 for the paper's sizes; of a ViT at most 32 pixels,
            so that at least two units fill each side of its grid, or single patches.
        mask_ratio: ρ, share of hidden units. Default 0.75.
        decoder_dim: width of the decoder; None: 512, or the encoder's when that is less.
        decoder_depth: its blocks; None: 8, or half the encoder's (at least 2) for small encoders.
        decoder_heads: its heads; None: about one per 32 channels, so many that they divide the width.
        norm_pix: targets have the mean and (unbiased) variance of their cell removed: (x − μ)/√(σ² + 1e-6).

    Shape: batch ``{"images": (B, T·c, H, W) or (B, T, c, H, W) in [0, 1]}``, optionally ``{"dates": (B, T)}``, →
    ``{"loss", "output": (B, N, p²c), "mask": (B, N), "logs"}``, the cells date by date in raster order.

    Raises: TypeError when the model holds neither a TiMo nor a plain ViT; BadInput for a ratio outside [0, 1), a unit
        that the network's cells do not divide, a series of a single unit, or other options out of range.

    Paper: TiMo: Spatiotemporal Foundation Model for Satellite Image Time Series, arXiv:2505.08723. AdamW, base learning
        rate 1.5e-4 · batch/256, 100 epochs with 10 of warm-up.

    Departs from the paper: small encoders get a small decoder by default; images of any size and plain ViTs are taken.
        The weights of the gyroscope attention that compare with the medians are not used here, as in the authors'
        program, and start fresh when the network is fine-tuned.
    """

    def __init__(
        self,
        model: nn.Module,
        unit: int | None = None,
        mask_ratio: float = 0.75,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        norm_pix: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise BadInput(f"mask_ratio={mask_ratio} must lie in [0, 1); 0.75 is usual.")
        self.model = model
        self.mask_ratio, self.norm_pix = mask_ratio, norm_pix
        network = self.network
        if isinstance(network, TiMo):
            dim, depth = network.num_features, sum(isinstance(m, Block) for m in network.modules())
            chans, self.cell = network.in_chans // network.frames, network.stride
        else:
            dim, depth = network.embed_dim, len(network.blocks)
            chans, self.cell = network.in_chans, _patch_side(network)
        self.unit = unit if unit is not None else self.cell if isinstance(network, TiMo) else _unit_side(network)
        if self.unit < 1 or self.unit % self.cell:
            raise BadInput(
                f"unit={unit} must be a multiple of {self.cell} pixels, the side of the last cells of "
                f"{type(network).__name__}; {-(-max(1, self.unit) // self.cell) * self.cell} would do."
            )
        width = decoder_dim if decoder_dim is not None else max(8, min(512, dim) // 8 * 8)
        heads = decoder_heads if decoder_heads is not None else num_decoder_heads(width)
        if width % heads or width % 8:
            raise BadInput(f"decoder_dim={width} must be a multiple of 8 and of decoder_heads={heads}.")
        blocks = decoder_depth if decoder_depth is not None else min(8, max(2, depth // 2))
        like = next(network.parameters())
        decoder = TokenDecoder(dim, width, blocks, heads, self.cell**2 * chans, (1, 1))
        self.decoder = decoder.to(like.device, like.dtype)

    @property
    def network(self) -> TiMo | ViT:
        """The TiMo or ViT inside ``model``."""
        found = next((m for m in self.model.modules() if isinstance(m, TiMo)), None)
        return host(self.model) if found is None else found

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        clip = self.prepare(batch["images"])
        with collect_aux(self.model) as aux:
            prediction, mask = self.reconstruct(clip, batch.get("dates"))
        loss = self.loss(prediction, *self.target(clip), mask)
        logs = {"reconstruction": loss.detach()}
        if aux:
            loss = loss + sum(aux.values())
        return {"loss": loss, "output": prediction, "mask": mask, "logs": logs}

    def prepare(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1], as a series or with the frames on the channel axis → (B, T, c, H, W), normalised."""
        frames = images.shape[1] if images.ndim == 5 else None
        network = self.network
        if frames is not None:
            if frames != 1 and not isinstance(network, TiMo):
                raise BadInput(f"A plain ViT takes single images, not series of {frames} frames; use a TiMo.")
            # as wrappers know them
            images = images.flatten(1, 2)
        images = to_model_space(self.model, images)
        if not isinstance(network, TiMo):
            return images.unsqueeze(1)
        return network.as_clip(images if frames is None else images.unflatten(1, (frames, -1)))

    def reconstruct(
        self, clip: Tensor, dates: Tensor | None = None, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised series → predictions (B, N, p²c) and the mask (B, N), True where hidden.

        Args:
            clip: (B, T, c, H, W), normalised. dates: (B, T), or None for 0, 1, …
            visible: (B, V) units to show, counted date by date in raster order; None: drawn at random.
        """
        frames = clip.shape[1]
        units = (frames, -(-clip.shape[-2] // self.unit), -(-clip.shape[-1] // self.unit))
        count, side = units[0] * units[1] * units[2], self.unit // self.cell
        if count < 2:
            raise BadInput(
                f"A series of {frames}×{clip.shape[-2]}×{clip.shape[-1]} pixels is a single unit of {self.unit}, of "
                "which nothing can be hidden; take larger images, or more frames."
            )
        if not isinstance(self.network, TiMo) and any(side % self.unit for side in clip.shape[-2:]):
            raise BadInput(
                f"A plain ViT needs units that divide the image, and {self.unit} pixels do not divide "
                f"{clip.shape[-2]}×{clip.shape[-1]}; use unit={self.cell}."
            )
        if visible is None:
            visible, _ = random_mask(len(clip), count, self.mask_ratio, clip.device)
        grid = (units[1] * side, units[2] * side)
        cells = unit_cells(units, side).to(clip.device)[visible].flatten(1)
        mask = torch.ones(len(clip), count * side**2, dtype=torch.bool, device=clip.device).scatter_(1, cells, False)
        tokens = self._encode(clip, visible, cells, dates)
        if dates is None:
            dates = torch.arange(frames, device=clip.device).unsqueeze(0)
        codes = sincos_clip(dates.to(clip.device), grid, self.decoder.width).flatten(1, 2)
        return self.decoder(tokens, cells, 0, codes=codes), mask

    def _encode(self, clip: Tensor, visible: Tensor, cells: Tensor, dates: Tensor | None) -> Tensor:
        """(B, V·s², D) of the visible units, in the order of ``cells``."""
        network = self.network
        if isinstance(network, TiMo):
            return network.encode_units(self._filled(clip), visible, self.unit, dates)
        x, layout = network.embed(clip[:, 0])
        order = cells.argsort(1)
        x, layout = run_visible(network, x, layout, cells.gather(1, order))
        x = network.norm(x)[:, layout.num_prefix :]
        return x.gather(1, order.argsort(1).unsqueeze(-1).expand_as(x))

    def _filled(self, clip: Tensor) -> Tensor:
        """Frames of whole units."""
        h, w = clip.shape[-2:]
        return F.pad(clip, (0, -w % self.unit, 0, -h % self.unit))

    def target(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, p²c) what the prediction is compared with, and (1, N, p²c) which of these pixels are real, 1 or 0."""
        frames, square = clip.shape[1], (self.cell, self.cell)
        rows = patchify(self._filled(clip).float().flatten(0, 1), square).unflatten(0, (-1, frames)).flatten(1, 2)
        real = patchify(self._filled(torch.ones_like(clip[:1, 0], dtype=torch.float32)), square).repeat(1, frames, 1)
        if not self.norm_pix:
            return rows, real
        count = real.sum(-1, keepdim=True)
        centred = rows - (rows * real).sum(-1, keepdim=True) / count.clamp(min=1)
        variance = (centred.square() * real).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
        return centred / (variance + 1e-6).sqrt(), real

    def loss(self, prediction: Tensor, target: Tensor, real: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the real pixels of hidden cells; 0 when none is hidden."""
        count = real.sum(-1)
        per_cell = ((prediction.float() - target).square() * real).sum(-1) / count.clamp(min=1)
        hidden = mask & (count > 0)
        return (per_cell * hidden).sum() / hidden.sum().clamp(min=1)

    def encoder(self) -> nn.Module:
        """The trained model without the decoder."""
        return self.model


def unit_cells(units: tuple[int, int, int], side: int) -> Tensor:
    """(U, side²) places of a unit's cells among all cells of a series, both date by date in raster order.

    >>> unit_cells((1, 1, 2), 2).tolist()
    [[0, 1, 4, 5], [2, 3, 6, 7]]

    Args:
        units: (T, rows, columns) of units. side: cells along a unit.
    """
    frames, rows, cols = units
    places = torch.arange(frames * rows * cols * side**2).view(1, 1, frames, rows * side, cols * side)
    return cut_units(places, side).flatten(2)[0].flatten(1)


def _patch_side(vit: ViT) -> int:
    high, wide = vit.patch_embed.patch_size
    if high != wide:
        raise BadInput(f"Units are squares, but this ViT has patches of {high}×{wide} pixels; use the objective mae.")
    return int(high)


def _unit_side(vit: ViT, most: int = 32) -> int:
    """The largest square of patches that divides the grid and leaves two of them on each side; else a patch."""
    patch, (rows, cols) = _patch_side(vit), vit.patch_embed.grid_size
    sides = range(max(1, most // patch), 0, -1)
    fits = (n for n in sides if rows % n == 0 and cols % n == 0 and min(rows, cols) >= 2 * n)
    return patch * next(fits, 1)
