"""Normalisation as part of the model, so that everything outside works on pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NormalizedModel(nn.Module):
    """``model((x − mean) / std)`` for images x (B, C, H, W) in [0, 1].

    Attacks, explanations and engines then share one pixel space; parameters keep the wrapped model's names below
    ``model.``. ``mean`` and ``std`` are buffers saved with the weights.

    Args:
        model: any network on normalised images.
        mean: one value per channel, in [0, 1] pixel units.
        std: likewise, positive.
        size: (H, W) the network works on; images of another size are resized to it (bilinear) inside the model.

    Raises: ValueError if the two differ in length or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean={list(mean)} and std={list(std)} need equal lengths and positive std.")
        self.model = model
        self.size = size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.prepare(x))

    def prepare(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1] as the network inside gets them."""
        x = (x - self.mean) / self.std
        if self.size is not None and x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        return x


def to_model_space(model: nn.Module, images: Tensor) -> Tensor:
    """Pixels in [0, 1] → what the network inside ``model`` expects: for methods that call the host's own steps."""
    return model.prepare(images) if isinstance(model, NormalizedModel) else images
