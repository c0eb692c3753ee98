"""What happens to an image before the model sees it, as a graph of its own that engines put in front of theirs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.deploy.source import quiet


class FromPixels(nn.Module):
    """8-bit images of any size → what a model takes: the largest centred region of its shape, resized, in [0, 1].

    The same as :func:`vitkit.data.decode.resample` on the region of :func:`vitkit.data.decode.fit_box`, an antialiased
    triangle filter, within one step of 255 (Pillow rounds between rows and columns, this once). An image that has the
    size already passes unchanged. Both directions are matrix products, which every engine has, for any height and
    width; on a large photograph they take as long as a small ViT.

    Args:
        image_size: (H, W) of the result.

    Shape: (B, H, W, C) uint8 → (B, C, *image_size) float32.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size

    def forward(self, pixels: Tensor) -> Tensor:
        rows, columns = (torch.arange(pixels.shape[i], device=pixels.device).float() for i in (1, 2))
        # sizes as tensors: exporters follow them, while a Python number would be fixed
        height, width = rows[-1:] + 1, columns[-1:] + 1
        new_height, new_width = self.image_size
        step = torch.minimum(height / new_height, width / new_width)
        x = pixels.permute(0, 3, 1, 2).float()
        x = _filter(rows, height, step, new_height) @ x @ _filter(columns, width, step, new_width).T
        return x.round().clamp(0, 255) / 255


def _filter(places: Tensor, length: Tensor, step: Tensor, size: int) -> Tensor:
    """(size, n) weights of n old pixels in each new one, ``step`` old pixels apart around the middle."""
    centres = length / 2 + step * (torch.arange(size, device=places.device) + 0.5 - size / 2)
    weight = (1 - (places + 0.5 - centres[:, None]).abs() / step.clamp(min=1)).clamp(min=0)
    return weight / weight.sum(1, keepdim=True)


def export_preparation(image_size: tuple[int, int], in_chans: int) -> torch.export.ExportedProgram:
    """:class:`FromPixels` as a program for any number, height and width of images."""
    free = {i: torch.export.Dim(name, min=1, max=65536) for i, name in enumerate(("batch", "height", "width"))}
    example = torch.zeros(2, 37, 53, in_chans, dtype=torch.uint8)
    with quiet(), torch.no_grad():
        return torch.export.export(FromPixels(image_size), (example,), dynamic_shapes=(free,))
