"""Self-pretraining: masked autoencoding on the very images that will be inspected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkit.pretrain.mae import MAE


class DefectMAE(MAE):
    """The masked autoencoder of microelectronics inspection: pretrain on the training images of the task itself.

    With fewer than 10,000 scanning-acoustic images, a ViT pretrained on them (and on nothing else) and then fine-tuned
    beats the same ViT from scratch, from natural images, and convolutional networks. In a study, ``defect-mae`` is
    pretrained on the training part only, then fine-tuned for the same epochs as every other recipe.

    Args:
        model: a ViT (or a wrapper around one); trained in place.
        mask_ratio: ρ = 0.75.
        scale: put every image between its own 1st and 99th grey percentile before masking, as acoustic amplitudes
            vary between scans. The fine-tuned model sees unscaled images unless they are prepared by
            :func:`prepare_scan` before training, so the default is off in a study.
        options: of :class:`~vitkit.pretrain.mae.MAE`.

    Paper: masked autoencoder self-pretraining for defect detection in microelectronics, arXiv:2504.10021.

    Departs from the paper: it is known by its abstract only; preprocessing, folds and scores are ours, and the decoder
    follows the encoder's size (the paper's encoders are ViT-S and ViT-B).
    """

    def __init__(self, model: nn.Module, mask_ratio: float = 0.75, scale: bool = False, **options: Any) -> None:
        super().__init__(model, mask_ratio=mask_ratio, **options)
        self.scale = scale

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.scale:
            batch = {**batch, "images": scale_percentiles(batch["images"])}
        return super().forward(batch)


def scale_percentiles(images: Tensor, low: float = 0.01, high: float = 0.99) -> Tensor:
    """Stretch every image (B, C, H, W) so that its ``low`` and ``high`` quantiles become 0 and 1; flat ones are 0."""
    flat = images.flatten(1).float()
    edges = torch.quantile(flat, torch.tensor([low, high], device=images.device), dim=1)
    bottom, top = (e[:, None, None, None] for e in edges)
    return (((images - bottom) / (top - bottom).clamp(min=1e-6)).clamp(0, 1) * (top > bottom)).to(images.dtype)


def prepare_scan(images: Tensor) -> Tensor:
    """Scanning-acoustic images (B, C, H, W): percentile scaling, then everything darker than Otsu's threshold of the
    image's own histogram (the chip's background) is set to 0."""
    scaled = scale_percentiles(images)
    return scaled * (scaled >= otsu(scaled)[:, None, None, None])


def otsu(images: Tensor, bins: int = 64) -> Tensor:
    """(B,) threshold in [0, 1] that maximises the variance between darker and brighter pixels of each image."""
    index = (images.flatten(1) * (bins - 1)).round().long()
    counts = torch.zeros(images.shape[0], bins, device=images.device).scatter_add_(
        1, index, torch.ones_like(index, dtype=torch.float32)
    )
    share = counts / counts.sum(1, keepdim=True)
    level = torch.arange(bins, device=images.device, dtype=torch.float32) / (bins - 1)
    below, mean_below = share.cumsum(1), (share * level).cumsum(1)
    mean = mean_below[:, -1:]
    between = (mean * below - mean_below).square() / (below * (1 - below)).clamp(min=1e-9)
    # a pixel belongs to the nearest level, so the classes part half-way between two of them
    return (between[:, :-1].argmax(1) + 0.5) / (bins - 1)
