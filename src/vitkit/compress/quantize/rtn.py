"""Round to nearest: the baseline that every quantizer must beat."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitkit.compress.change import Change
from vitkit.compress.quantize.calibrate import Precision, Progress, quantize_layers, restore_layers
from vitkit.compress.walker import Images


def rtn(
    model: nn.Module,
    images: Images | None = None,
    w_bits: int = 4,
    a_bits: int | None = None,
    sym: bool = False,
    group_size: int = -1,
    w_clip: bool = True,
    head_bits: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> tuple[nn.Module, Change]:
    """Round every weight of the blocks' linear layers to its nearest grid value; nothing is learned from data.

    ``q = s·(clip(round(w/s) + z, 0, 2^b − 1) − z)`` with one (s, z) per output channel, or per group of inputs.

    >>> import torch
    >>> from vitkit.models.build import build
    >>> small, change = rtn(build("vit_femto", img_size=8, in_chans=1, num_classes=3), w_bits=4)
    >>> change.what, change.details["packed_bytes"] < change.details["bytes_before"] / 5
    ('16 linear layers to 4-bit weights', True)

    Args:
        model: any network with plain ``nn.Linear`` layers (plain ViT, Swin, ConvNeXt with linear MLPs …); not changed.
        images: (N, C, H, W) in [0, 1], or batches as a loader gives them: only to measure the layers' output errors.
        w_bits: bits of the weights, 2 to 8; 16 leaves them.
        a_bits: bits of every such layer's input (per token, asymmetric, dynamic); None leaves inputs alone.
        sym: symmetric grid instead of asymmetric.
        group_size: inputs of a row that share a step; −1 for one step per output channel.
        w_clip: search the clipping range of each step.
        head_bits: also round the classifier's weights; None leaves it.
        batch_size: images pushed through at once.
        progress: called as ``progress("rtn", layers done, layers)``.

    Returns: the quantized copy and the account of the change; ``details["layers"]`` has an entry per layer.

    Raises: BadInput for bits out of range, a group size that does not fit, or a model without linear layers.
    Paper: the round-to-nearest baseline of arXiv:2504.02692; the clipping search is that of its released code.
    Departs from the paper: nothing.
    """
    precision = Precision(
        w_bits=w_bits, a_bits=a_bits, sym=sym, group_size=group_size, w_clip=w_clip, head_bits=head_bits
    )
    return quantize_layers(model, images, "rtn", precision, None, batch_size=batch_size, progress=progress)


def restore(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Rebuild the structure that :func:`rtn` left, for saved weights."""
    return restore_layers(model, "rtn", options)
