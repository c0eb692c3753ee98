"""What happens to an image before the model sees it, as a graph of its own that engines put in front of theirs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.deploy.resampling import resampling_weights
from vitkit.deploy.source import quiet


class FromPixels(nn.Module):
    """8-bit images of any size → what a model takes: the largest centred region of its shape, resized, in [0, 1].

    The same as :func:`vitkit.data.decode.resample` on the region of :func:`vitkit.data.decode.fit_box`, an antialiased
    triangle filter, within one step of 255 (Pillow rounds between rows and columns, this once). An image that has the
    size already passes unchanged. The two matrix products take about 0.7 G multiply-adds a megapixel
    of RGB at 224 rows.

    Args:
        image_size: (H, W) of the result.

    Shape: (B, H, W, C) uint8 → (B, C, *image_size) float32.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size

    def forward(self, pixels: Tensor) -> Tensor:
        old = [torch.arange(pixels.shape[i], device=pixels.device).float() for i in (1, 2)]
        new = [torch.arange(side, device=pixels.device).float() for side in self.image_size]
        step = torch.minimum((old[0][-1:] + 1) / self.image_size[0], (old[1][-1:] + 1) / self.image_size[1])
        rows, columns = (resampling_weights(o, n, step) for o, n in zip(old, new))
        x = rows @ pixels.permute(0, 3, 1, 2).float() @ columns.T
        return x.round().clamp(0, 255) / 255


def export_preparation(image_size: tuple[int, int], in_chans: int) -> torch.export.ExportedProgram:
    """:class:`FromPixels` as a program for any number, height and width of images."""
    free = {i: torch.export.Dim(name, min=1, max=65536) for i, name in enumerate(("batch", "height", "width"))}
    example = torch.zeros(2, 37, 53, in_chans, dtype=torch.uint8)
    with quiet(), torch.no_grad():
        return torch.export.export(FromPixels(image_size), (example,), dynamic_shapes=(free,))
