"""Masked autoencoding: predict the pixels of hidden patches."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkit.anatomy.host import host
from vitkit.models.layout import TokenLayout
from vitkit.models.normalized import to_model_space
from vitkit.models.vit import ViT, collect_aux
from vitkit.pretrain.decoder import TokenDecoder
from vitkit.pretrain.masking import random_mask
from vitkit.pretrain.patches import patchify
from vitkit.pretrain.positions import sincos_2d


class MAE(nn.Module):
    """``Σ_{n hidden} mean_pixels (pred_n − target_n)² / max(1, #hidden)``; the encoder sees visible patches only.

    Args:
        model: a ViT (or a wrapper around one); trained in place.
        mask_ratio: ρ, share of hidden patches. Default 0.75.
        decoder_dim: width of the decoder; None: 512, or twice the encoder's when that is less.
        decoder_depth: its blocks; None: 8, or half the encoder's (at least 2) for small encoders.
        decoder_heads: its heads; None: about one per 32 channels, so many that they divide the width.
        norm_pix: targets are patches with their own mean and (unbiased) variance removed: (x − μ)/√(σ² + 1e-6).
        positions: "sincos" writes fixed sine–cosine codes into the host's position table and holds them still while
            pretraining, which throws away the table of a pretrained model; "host" leaves the table as it is, learned.

    Shape: batch ``{"images": (B, C, H, W) in [0, 1]}`` → ``{"loss", "output": (B, N, p²C), "mask": (B, N), "logs"}``.

    The decoder is made on the model's device and in its dtype. Images of another size than the model's own are taken if
    the model takes them.

    Raises: TypeError when the model holds no plain ViT; ValueError for a ratio outside [0, 1), a tokenizer that does
        not give one token per patch of the grid, blocks that merge or drop tokens, or patches that do not divide the
        images.

    Paper: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377.

    Departs from the paper: small encoders get a small decoder by default (the paper's 512×8 would be ten times the
    model); its 1,600 epochs at batch 4,096 are the caller's choice.
    """

    def __init__(
        self,
        model: nn.Module,
        mask_ratio: float = 0.75,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        norm_pix: bool = True,
        positions: Literal["sincos", "host"] = "sincos",
    ) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio={mask_ratio} must lie in [0, 1); 0.75 is usual.")
        if positions not in ("sincos", "host"):
            raise ValueError(f"positions={positions!r} is not known; use 'sincos' or 'host'.")
        self.model = model
        self.mask_ratio, self.norm_pix = mask_ratio, norm_pix
        vit = host(model)
        embed = vit.patch_embed
        self.patch_size = (int(embed.patch_size[0]), int(embed.patch_size[1]))
        grid = (int(embed.grid_size[0]), int(embed.grid_size[1]))
        width = decoder_dim if decoder_dim is not None else min(512, 2 * vit.embed_dim // 4 * 4)
        heads = decoder_heads if decoder_heads is not None else num_decoder_heads(width)
        depth = decoder_depth if decoder_depth is not None else min(8, max(2, len(vit.blocks) // 2))
        if width % heads or width % 4:
            raise ValueError(f"decoder_dim={width} must be a multiple of 4 and of decoder_heads={heads}.")
        pixels = self.patch_size[0] * self.patch_size[1] * vit.in_chans
        like = next(vit.parameters())
        self.decoder = TokenDecoder(vit.embed_dim, width, depth, heads, pixels, grid).to(like.device, like.dtype)
        self.fixed_positions = positions == "sincos" and vit.pos_embed is not None
        if self.fixed_positions:
            _write_sincos(vit, grid)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = to_model_space(self.model, batch["images"])
        with collect_aux(self.model) as aux:
            prediction, mask = self.reconstruct(images)
        loss = self.loss(prediction, self.target(images), mask)
        logs = {"reconstruction": loss.detach()}
        if aux:
            loss = loss + sum(aux.values())
        return {"loss": loss, "output": prediction, "mask": mask, "logs": logs}

    def reconstruct(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalised images → predictions (B, N, p²C) and the mask (B, N), True where hidden.

        Args:
            images: (B, C, H, W), normalised.
            visible: (B, V) patches to show; None: drawn at random.
        """
        vit = host(self.model)
        x, layout = vit.embed(images)
        num_patches = layout.num_original
        if visible is None:
            visible, mask = random_mask(x.shape[0], num_patches, self.mask_ratio, x.device)
        else:
            mask = torch.ones(x.shape[0], num_patches, dtype=torch.bool, device=x.device).scatter_(1, visible, False)
        x, layout = run_visible(vit, x, layout, visible)
        return self.decoder(vit.norm(x), visible, layout.num_prefix, (layout.grid[-2], layout.grid[-1])), mask

    def target(self, images: Tensor) -> Tensor:
        """(B, N, p²C) what the prediction is compared with."""
        rows = patchify(images, self.patch_size).float()
        if not self.norm_pix:
            return rows
        return (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True) + 1e-6).sqrt()

    def loss(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over hidden patches; 0 when none is hidden."""
        per_patch = (prediction.float() - target).square().mean(-1)
        return (per_patch * mask).sum() / mask.sum().clamp(min=1)

    def encoder(self) -> nn.Module:
        """The trained model without the decoder; its position table may be trained again."""
        if self.fixed_positions:
            table = host(self.model).pos_embed
            assert table is not None
            table.requires_grad_(True)
        return self.model


def run_visible(vit: ViT, x: Tensor, layout: TokenLayout, visible: Tensor) -> tuple[Tensor, TokenLayout]:
    """The blocks on the prefix and the visible patches alone.

    Args:
        vit: the host. x, layout: what its ``embed`` gave, (B, P+N, D). visible: (B, V) patches, in raster order.

    Returns: tokens (B, P+V, D), not normalised, and their layout.
    Raises: ValueError for a tokenizer that does not give one token per patch, and for blocks that merge or drop tokens.
    """
    num_patches = layout.num_original
    if not layout.is_full_grid or x.shape[1] != layout.num_prefix + num_patches:
        raise ValueError(
            f"Masked autoencoding needs one token per patch of the {layout.grid} grid, but "
            f"{type(vit.patch_embed).__name__} gives {x.shape[1] - layout.num_prefix}; use another tokenizer, and "
            "no patch dropout (patch_drop_rate)."
        )
    prefix, patches = x[:, : layout.num_prefix], x[:, layout.num_prefix :]
    kept = patches.gather(1, visible.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    if visible.shape[1] < num_patches:
        # hidden patches are absent, not merged: the visible ones still stand for one patch each
        layout = layout.take(visible).replace(sizes=None)
    x, layout = vit.run(torch.cat([prefix, kept], dim=1), layout)
    if x.shape[1] - layout.num_prefix != visible.shape[1]:
        raise ValueError(
            f"{visible.shape[1]} visible patches went in and {x.shape[1] - layout.num_prefix} came out: blocks "
            "that merge or drop tokens cannot be pretrained by masking; pretrain first, merge afterwards."
        )
    return x, layout


def num_decoder_heads(width: int) -> int:
    """The most heads of at least 32 channels that divide the width; 1 if there are none."""
    return max((h for h in range(1, width // 32 + 1) if width % h == 0), default=1)


def _write_sincos(vit: ViT, grid: tuple[int, int]) -> None:
    table = vit.pos_embed
    assert table is not None
    with torch.no_grad():
        codes = sincos_2d(grid, table.shape[-1]).to(table)
        # rows of prefix tokens, where the table has them, stay at zero as in the paper
        table.zero_()
        table[:, table.shape[1] - codes.shape[0] :] = codes
    table.requires_grad_(False)
