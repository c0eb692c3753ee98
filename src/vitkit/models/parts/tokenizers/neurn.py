"""NeuRN: local contrast in place of intensities, so that a classifier carries over to images that look different."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

# a window whose variance is below this is flat: square roots near zero have unbounded gradients
FLAT = 1e-12


class NeuRN(nn.Module):
    """A tokenizer that sees the local contrast of the image instead of its intensities.

    With p the k×k window around a pixel of one channel (stride 1, reflected at the border):

    ``σ = √mean_p (x − mean_p x)²``, ``y = σ / max σ``, the maximum taken over the image.

    y does not change when a constant is added to the image, when it is scaled by a positive number or when its
    contrast is inverted. A flat image gives zeros. NeuRN has no parameters; the tokenizer that stood in the slot runs
    behind it with its own weights, below ``patch_embed.tokenizer``. Put tokenizers that replace the patch embedding
    in first: ``tokenizer=["conv-stem", "neurn"]``.

    >>> import torch
    >>> float(neurn(torch.eye(8).expand(1, 1, 8, 8)).max())
    1.0

    Args:
        k: side of the window, pixels; odd, at least 3. Default 3; 3 to 9 are usual.
        per_channel: divide each channel by its own maximum instead of the image's.
        concat: append y to the image's channels instead of replacing the image; the patch embedding's weights for
            the new channels start at zero, so a warm swap keeps what the model computes.

    Shape: images (B, C, H, W), or a list of (C, H, W) where the tokenizer behind takes one → tokens (B, N, D), layout.

    Raises: ValueError if k is even or below 3, if an image is too small to be reflected, or if ``concat`` is asked for
        in front of a tokenizer that is no plain patch embedding.

    Paper: NeuRN: Neuro-inspired Domain Generalization for Image Classification, arXiv:2505.06881.

    Departs from the paper: k = 3, the reflected border, ``per_channel`` and ``concat`` are ours. Windows with a
    variance under 1e-12 count as flat, so the invariance to scaling ends there. The image arrives as the model gets
    it, that is after the normalisation of its channels; where their deviations differ, it weighs the channels' contrast
    against each other.
    """

    slot = "tokenizer"
    preserves = "none"

    @classmethod
    def from_standard(
        cls,
        old: nn.Module,
        spec: PartSpec,
        warm: bool = True,
        k: int = 3,
        per_channel: bool = False,
        concat: bool = False,
    ) -> NeuRN:
        _check_window(k, *spec.image_size)
        tokenizer = _widened(old, spec.in_chans) if concat else old
        if not warm:
            tokenizer = copy.deepcopy(tokenizer)
            for module in tokenizer.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        return cls(tokenizer, k, per_channel, concat)

    def __init__(self, tokenizer: nn.Module, k: int = 3, per_channel: bool = False, concat: bool = False) -> None:
        super().__init__()
        self.tokenizer, self.k, self.per_channel, self.concat = tokenizer, k, per_channel, concat

    def __getattr__(self, name: str) -> Any:
        # sizes and grids are those of the tokenizer behind, also after they change
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("tokenizer"), name)

    def forward(self, images: Tensor | list[Tensor]) -> tuple[Tensor, TokenLayout]:
        if isinstance(images, Tensor):
            return self._tokens(self._seen(images))
        return self._tokens([self._seen(image.unsqueeze(0)).squeeze(0) for image in images])

    def _seen(self, images: Tensor) -> Tensor:
        contrast = neurn(images, self.k, self.per_channel)
        return torch.cat([images, contrast], 1) if self.concat else contrast

    def _tokens(self, images: Any) -> tuple[Tensor, TokenLayout]:
        if getattr(self.tokenizer, "slot", None) == "tokenizer":
            return self.tokenizer(images)
        height, width = self.tokenizer.dynamic_feat_size(images.shape[-2:])
        x = self.tokenizer(images)
        return (x.flatten(1, 2) if x.ndim == 4 else x), TokenLayout(grid=(height, width))


def neurn(images: Tensor, k: int = 3, per_channel: bool = False) -> Tensor:
    """Local contrast of images (B, C, H, W), divided by its maximum; see :class:`NeuRN`.

    Args:
        images: (B, C, H, W) of any range; half precision is computed in float32.
        k: side of the window, pixels; odd, at least 3.
        per_channel: divide each channel by its own maximum instead of the image's.

    Returns: (B, C, H, W) in [0, 1], in the dtype of ``images``.

    Raises: ValueError if k is even or below 3, or the image is too small to be reflected.
    """
    height, width = images.shape[-2:]
    _check_window(k, height, width)
    x = images if images.dtype == torch.float64 else images.float()
    padded = F.pad(x, (k // 2,) * 4, mode="reflect")
    # Two passes over k² shifted views: E[x²] − E[x]² loses its digits where the image is nearly flat, and so does a
    # mean of bright pixels not taken relative to the one in the middle. Unfolding would hold k² copies at once.
    shifted = [padded[..., i : i + height, j : j + width] for i in range(k) for j in range(k)]
    middle = sum((view - x for view in shifted), x.new_zeros(())) / k**2
    variance = sum(((view - x - middle).square() for view in shifted), x.new_zeros(())) / k**2
    flat = variance < FLAT
    sigma = variance.masked_fill(flat, 1.0).sqrt().masked_fill(flat, 0.0)
    top = sigma.amax(dim=(-2, -1) if per_channel else (-3, -2, -1), keepdim=True)
    return (sigma / top.masked_fill(top == 0, 1.0)).to(images.dtype)


def _check_window(k: int, height: int, width: int) -> None:
    if not isinstance(k, int) or k < 3 or k % 2 == 0:
        raise BadInput(f"NeuRN: k={k!r} is not a window around a pixel; it must be odd and at least 3, such as k=3.")
    if k // 2 >= min(height, width):
        raise BadInput(
            f"NeuRN: a window of k={k} cannot be reflected at the border of images of {height}×{width} pixels; "
            f"use images of at least {k // 2 + 1} pixels a side or a smaller k (3 needs 2 pixels)."
        )


def _widened(old: nn.Module, in_chans: int) -> nn.Module:
    """``old`` with a projection that reads as many channels again, which it does not heed yet."""
    conv = getattr(old, "proj", None)
    if getattr(old, "slot", None) == "tokenizer" or not isinstance(conv, nn.Conv2d):
        raise BadInput(
            f"NeuRN: concat=True widens a plain patch embedding, but the tokenizer is {type(old).__name__}; "
            "leave concat=False there."
        )
    new = copy.copy(old)
    new._modules = dict(old._modules)
    wide = copy.deepcopy(conv)
    wide.in_channels = 2 * in_chans
    weight = torch.cat([conv.weight, torch.zeros_like(conv.weight)], 1)
    wide.weight = nn.Parameter(weight.detach(), requires_grad=conv.weight.requires_grad)
    new.proj = wide
    return new
