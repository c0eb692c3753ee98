"""Convolutional stem: a few strided convolutions in place of the patch embedding, so that training is steadier."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.cells import as_tokens
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec


class ConvStem(nn.Module):
    """Makes tokens by stacked strided convolutions instead of one convolution as large as a patch.

    ``x_i = ReLU(BN(conv_i(x_{i−1})))`` for i = 1 … n, ``tokens = W x_n + b`` (a 1×1 convolution), with strides whose
    product is the patch size p, so that the grid of tokens is that of the patch embedding. For p = 2ⁿ every conv_i is
    3×3 with stride 2, and the channels double up to the width D: D/2ⁿ⁻¹, …, D/2, D.

    Neighbouring tokens see overlapping pixels. The stem costs about as much as one transformer block at p = 16; the
    paper leaves out a block in exchange, which a part cannot do: build the host with ``depth`` one smaller.

    Args:
        channels: of conv_1 … conv_n, a number where n = 1. None: D/2ⁿ⁻¹, …, D/2, D, rounded up.
        strides: of conv_1 … conv_n likewise; their product is the patch size p. None: the prime factors of p, largest
            first. ``channels=(64, 128, 128, 256, 256, 512), strides=(2, 2, 1, 2, 1, 2)`` is a deeper stem.

    Shape: images (B, C, H, W) → tokens (B, N, D), layout; N = (H / p)·(W / p).

    Raises: ValueError if channels and strides do not fit together or to the patch size, if another part stands in the
        slot already, or if the image cannot be cut into whole patches.

    Paper: Early Convolutions Help Transformers See Better, arXiv:2106.14881.

    Departs from the paper: patch sizes that are no power of two; their odd factors s become convolutions of stride s
    and side s + 2, first in the stack. The host keeps its depth unless it is built with less.
    """

    slot = "tokenizer"
    preserves = "none"

    @classmethod
    def from_standard(
        cls,
        old: nn.Module,
        spec: PartSpec,
        warm: bool = True,
        channels: int | Sequence[int] | None = None,
        strides: int | Sequence[int] | None = None,
    ) -> ConvStem:
        if getattr(old, "slot", None) == "tokenizer" and not isinstance(old, cls):
            raise BadInput(
                f"conv-stem takes the place of the patch embedding, but the tokenizer is {type(old).__name__}; put "
                "conv-stem in first."
            )
        return cls(
            spec.dim, spec.patch_size, spec.image_size, spec.in_chans, channels, strides,
            dynamic_img_pad=getattr(old, "dynamic_img_pad", False),
        )  # fmt: skip

    def __init__(
        self,
        dim: int,
        patch_size: tuple[int, int],
        img_size: tuple[int, int],
        in_chans: int = 3,
        channels: int | Sequence[int] | None = None,
        strides: int | Sequence[int] | None = None,
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        steps = _steps(patch_size, _several(strides))
        widths = _several(channels) or [math.ceil(dim / 2**i) for i in reversed(range(len(steps)))]
        if len(widths) != len(steps) or any(not isinstance(width, int) or width < 1 for width in widths):
            raise BadInput(
                f"conv-stem: channels={tuple(widths)} must be one positive whole number for each of the {len(steps)} "
                f"convolutions (strides {[s[0] if s[0] == s[1] else s for s in steps]}); leave it out for the default."
            )
        self.patch_size, self.img_size, self.dynamic_img_pad = tuple(patch_size), tuple(img_size), dynamic_img_pad
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = math.prod(self.grid_size)
        layers: list[nn.Module] = []
        for width_in, width, step in zip([in_chans, *widths], widths, steps):
            layers += [_strided(width_in, width, step), nn.BatchNorm2d(width), nn.ReLU()]
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(widths[-1], dim, 1)
        # tokens of variance one behind ReLU, whatever the width
        nn.init.normal_(self.proj.weight, std=math.sqrt(2 / widths[-1]))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
        """The grid (h, w) of an image of (H, W) pixels."""
        (height, width), (p_h, p_w) = img_size, self.patch_size
        if self.dynamic_img_pad:
            return math.ceil(height / p_h), math.ceil(width / p_w)
        return height // p_h, width // p_w

    def forward(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        (height, width), (p_h, p_w) = images.shape[-2:], self.patch_size
        if self.dynamic_img_pad:
            images = F.pad(images, (0, -width % p_w, 0, -height % p_h))
        elif height % p_h or width % p_w:
            raise BadInput(
                f"conv-stem: images of {height}×{width} pixels cannot be cut into {p_h}×{p_w} patches; resize them "
                f"to {max(height // p_h, 1) * p_h}×{max(width // p_w, 1) * p_w}."
            )
        x = self.proj(self.stem(images))
        return as_tokens(x), TokenLayout(grid=(x.shape[-2], x.shape[-1]))


def _several(values: int | Sequence[int] | None) -> list[int]:
    # a single number is how a command line says one convolution
    return [] if values is None else [values] if isinstance(values, int) else list(values)


def _steps(patch_size: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Strides (rows, columns) of the convolutions."""
    if strides:
        if any(not isinstance(s, int) or s < 1 for s in strides) or set(patch_size) != {math.prod(strides)}:
            raise BadInput(
                f"conv-stem: strides={tuple(strides)} must be positive whole numbers whose product is the patch size "
                f"{patch_size[0]}×{patch_size[1]}; leave it out for the default."
            )
        return [(s, s) for s in strides]
    rows, columns = _prime_factors(patch_size[0]), _prime_factors(patch_size[1])
    num = max(len(rows), len(columns), 1)
    # a shorter list is filled up in front, where the fields of view are still small
    return list(zip([1] * (num - len(rows)) + rows, [1] * (num - len(columns)) + columns))


def _prime_factors(n: int) -> list[int]:
    factors = []
    divisor = 2
    while n > 1:
        while n % divisor == 0:
            factors.append(divisor)
            n //= divisor
        divisor += 1
    return factors[::-1]


def _strided(width_in: int, width: int, stride: tuple[int, int]) -> nn.Conv2d:
    # these sides overlap their neighbours and give exactly size / stride outputs; a bias would be taken out again by
    # the batch norm
    side = tuple(s + 1 if s % 2 == 0 else s + 2 for s in stride)
    return nn.Conv2d(width_in, width, (side[0], side[1]), stride, padding=1, bias=False)
