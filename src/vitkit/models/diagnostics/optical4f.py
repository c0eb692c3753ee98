"""What the shared convolutions of a model would cost on a free-space optical correlator (a 4f system)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from vitkit.anatomy.capture import Trace
from vitkit.anatomy.host import host
from vitkit.anatomy.untouched import untouched
from vitkit.errors import BadInput
from vitkit.models.shared_conv import Optics, SharedConv

# s side of a token's map · k side of a kernel · R_h×R_w pixels of the plane


@dataclass(frozen=True)
class OpticalLayer:
    """One layer on the correlator.

    Attributes:
        name: of the module. tokens: of the whole batch. kernels: two-dimensional ones a token meets (M·c).
        tile: s + k − 1, pixels along the side of a correlation. tiles_per_frame: how many fit on the plane.
        frames: exposures the layer takes. macs: multiply-adds it does in the light.
    """

    name: str
    tokens: int
    kernels: int
    tile: int
    tiles_per_frame: int
    frames: int
    macs: int


@dataclass(frozen=True)
class OpticalCost:
    """The model of a 4f system applied to one forward.

    Attributes:
        layers: one a convolution. frames: of all of them. seconds: frames over the frame rate, without electronics.
        macs: multiply-adds done in the light.
        how: always "modelled": nothing of this was measured.
    """

    layers: tuple[OpticalLayer, ...]
    frames: int
    seconds: float
    macs: int
    how: str = "modelled"


def optical4f(
    model: nn.Module,
    plane: tuple[int, int] = (2160, 3840),
    fps: float = 2000.0,
    signed: bool = True,
    batch: int = 1,
    patches: bool = True,
) -> OpticalCost:
    """Frames and seconds that the convolutions of a ViT take on a 4f correlator.

    One frame correlates as many tiles as fit on the plane, each a token's map with a kernel:

    ``tile = s + k − 1``, ``tiles = ⌊R_h / tile⌋·⌊R_w / tile⌋``, ``frames = ⌈tokens·kernels / tiles⌉``, ``seconds =
    frames / fps``,

    summed over the layers, one after another; twice the frames where kernels are signed, since light adds only and the
    difference of two exposures is taken. Counted are the :class:`~vitkit.models.shared_conv.SharedConv` layers and the
    patch projection. Everything else (attention's products, norms, the classifier, moving data in and out) is
    electronic and not part of it, so this is a lower bound.

    Args:
        model: a host with the parts ``conv-share`` and/or ``conv-share-mlp``, or a wrapper around one; left as found.
        plane: (R_h, R_w), pixels of the light modulator and the camera.
        fps: frames a second of the slower of the two.
        signed: kernels have negative entries.
        batch: images computed together, which fills the plane better.
        patches: count the patch projection, whose tokens are raw patches, if its patches lie side by side.

    Raises: BadInput if there is no shared convolution, a tile does not fit on the plane, or a number is not positive.
    Paper: ConvShareViT, arXiv:2504.11517.
    Departs from the paper: known by its abstract; the formula and its defaults (a 4K plane, 2 kHz) are ours.
    """
    for name, value in (("plane", min(plane)), ("fps", fps), ("batch", batch)):
        if not value > 0:
            raise BadInput(f"{name}={plane if name == 'plane' else value} must be positive.")
    vit = host(model)
    convs = {name: m for name, m in vit.named_modules() if isinstance(m, SharedConv)}
    if not convs:
        raise BadInput(
            "This model has no shared convolutions to run on a 4f system; put them in with "
            'swap(model, "mixer", "conv-share") and swap(model, "mlp", "conv-share-mlp").'
        )
    parameter = next(vit.parameters())
    size = tuple(getattr(vit.patch_embed, "img_size", None) or vit.patch_embed.patch_size)
    image = torch.zeros(1, vit.in_chans, *size, dtype=parameter.dtype, device=parameter.device)
    # how many tokens arrive is seen in a forward, since parts may merge or add some
    with untouched(vit), torch.no_grad(), Trace(vit, list(convs)) as trace:
        _, layout = vit.run(*vit.embed(image))
    layers = []
    projection = getattr(vit.patch_embed, "proj", None)
    if patches and isinstance(projection, nn.Conv2d) and projection.stride == projection.kernel_size:
        count, area = layout.num_original, projection.kernel_size[0] * projection.kernel_size[1]
        kernels = projection.in_channels * projection.out_channels
        sides = [2 * side - 1 for side in projection.kernel_size]
        name = "patch_embed.proj"
        layers.append(_layer(name, batch * count, kernels, sides, plane, signed, batch * count * kernels * area))
    for name, conv in convs.items():
        count, kernels = trace[name].shape[1], conv.kernels * conv.maps
        tile = conv.side + conv.kernel - 1
        macs = batch * count * kernels * conv.kernel**2 * conv.out_side**2
        layers.append(_layer(name, batch * count, kernels, [tile, tile], plane, signed, macs))
    frames = sum(layer.frames for layer in layers)
    return OpticalCost(
        layers=tuple(layers), frames=frames, seconds=frames / fps, macs=sum(layer.macs for layer in layers)
    )


def _layer(
    name: str, tokens: int, kernels: int, tile: list[int], plane: tuple[int, int], signed: bool, macs: int
) -> OpticalLayer:
    per_frame = (plane[0] // tile[0]) * (plane[1] // tile[1])
    if not per_frame:
        raise BadInput(
            f"{name}: a tile of {tile[0]}×{tile[1]} pixels does not fit on a plane of {plane[0]}×{plane[1]}; give a "
            "larger plane."
        )
    frames = -(-tokens * kernels // per_frame) * (2 if signed else 1)
    return OpticalLayer(name, tokens, kernels, max(tile), per_frame, frames, macs)


@contextmanager
def through_optics(model: nn.Module, optics: Optics) -> Iterator[nn.Module]:
    """Inside the ``with``, the shared convolutions of ``model`` round and blur as :class:`Optics` says.

    >>> import torch, vitkit
    >>> model = vitkit.build("vit_femto", img_size=8, in_chans=1, num_classes=3, mixer="conv-share")
    >>> with through_optics(model, Optics(kernel_bits=4, detector_noise=0.01)):
    ...     logits = model(torch.zeros(2, 1, 8, 8))

    Raises: BadInput if there is no shared convolution.
    """
    convs = [m for m in model.modules() if isinstance(m, SharedConv)]
    if not convs:
        raise BadInput("This model has no shared convolutions; put them in with swap(model, 'mixer', 'conv-share').")
    before = [conv.optics for conv in convs]
    for conv in convs:
        conv.optics = optics
    try:
        yield model
    finally:
        for conv, old in zip(convs, before):
            conv.optics = old
