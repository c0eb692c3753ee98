"""Boxes from a pyramid: any network with stages, a path-aggregation neck and torchvision's anchor-free detector."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork

from vitkit.errors import BadInput
from vitkit.models.backbones.pyramid import Halve

# B images or sequences · T windows · L levels of the pyramid


class PAFPN(nn.Module):
    """Path aggregation: a top-down pyramid P (torchvision's FPN), then a bottom-up one.

    ``N_1 = P_1``, ``N_{i+1} = relu(conv(P_{i+1} + ↓relu(N_i)))`` with 3×3 convolutions, ↓ of stride 2.

    Args:
        dims: channels of the L maps, finest first. channels: of every output.

    Shape: L maps (B, C_i, H_i, W_i) → as many of ``channels``, by name "0", "1", …
    Paper: Path Aggregation Network for Instance Segmentation, arXiv:1803.01534.
    """

    def __init__(self, dims: Sequence[int], channels: int) -> None:
        super().__init__()
        self.top_down = FeaturePyramidNetwork(list(dims), channels)
        self.down = nn.ModuleList(Halve(channels, channels) for _ in dims[1:])
        self.out = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in dims[1:])

    def forward(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        found = self.top_down(OrderedDict((str(i), m) for i, m in enumerate(maps)))
        last = found["0"]
        result = OrderedDict([("0", last)])
        for i, (down, out) in enumerate(zip(self.down, self.out), start=1):
            level = found[str(i)]
            # a map of odd sides may be a cell smaller than half of the finer one, rounded up
            last = F.relu(out(level + F.interpolate(down(F.relu(last)), level.shape[-2:])))
            result[str(i)] = last
        return result


class _Features(nn.Module):
    """What torchvision calls the backbone; the memory of a recurrent net goes in and out beside the maps."""

    def __init__(self, net: nn.Module, stages: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.net, self.stages, self.out_channels = net, stages, channels
        self.neck = PAFPN([net.feature_info[i]["num_chs"] for i in stages], channels)
        self.memory: Any = None

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        if hasattr(self.net, "stream"):
            clip = images.unflatten(1, (-1, self.net.in_chans // self.net.windows))
            maps, self.memory = self.net.stream(clip, self.memory)
            return self.neck([maps[i][:, -1] for i in self.stages])
        maps = self.net.forward_intermediates(images, indices=list(self.stages), intermediates_only=True)
        return self.neck(maps)


class _NoResize(GeneralizedRCNNTransform):
    """Pixels and boxes as they are: a camera's images all have one size."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


class PyramidDetector(nn.Module):
    """Maps of a network, :class:`PAFPN`, and the head and losses of torchvision's FCOS, see :func:`detector`."""

    def __init__(self, net: nn.Module, num_classes: int, stages: Sequence[int], channels: int, **options: Any) -> None:
        super().__init__()
        strides = [net.feature_info[i]["reduction"] for i in stages]
        self.fcos = FCOS(
            _Features(net, tuple(stages), channels),
            num_classes,
            # one box of a cell's size a cell: FCOS reads from it at which level boxes of a size are found
            anchor_generator=AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides)),
            **options,
        )
        self.fcos.transform = _NoResize(1, 1, [0.0], [1.0], size_divisible=max(strides))

    def forward(
        self, images: Tensor, targets: list[dict[str, Tensor]] | None = None, memory: Any = None
    ) -> tuple[Any, Any]:
        """Detect in a batch of images, or in the last of a batch of windows.

        Args:
            images: (B, C, H, W); for a recurrent net also (B, T, c, H, W).
            targets: in training mode, one dict an image: "boxes" (n, 4) as x0, y0, x1, y1 in pixels and "labels" (n,)
                from 0 to K − 1.
            memory: of a recurrent net, from the last call; None at the start of a sequence.

        Returns: in training mode a dict of losses to add up, else a list of dicts with "boxes", "scores" and "labels";
            and the new memory, None if the net has none.

        Raises: BadInput if memory is given to a net without one, or images have the wrong number of axes.
        """
        features = self.fcos.backbone
        streams = hasattr(features.net, "stream")
        if images.ndim not in ((4, 5) if streams else (4,)) or (memory is not None and not streams):
            raise BadInput(
                f"{type(features.net).__name__} detects in images (B, C, H, W)"
                + (" or windows (B, T, c, H, W)" if streams else ", without memory")
                + f"; it got {tuple(images.shape)}{'' if memory is None else ' and a memory'}."
            )
        flat = images.flatten(1, 2) if images.ndim == 5 else images
        features.memory = memory
        try:
            found = self.fcos(list(flat), targets)
            return found, features.memory
        finally:
            features.memory = None


def detector(
    net: nn.Module, num_classes: int, stages: Sequence[int] = (1, 2, 3), channels: int = 96, **options: Any
) -> PyramidDetector:
    """An object detector on the maps of a network.

    The box path of event detectors such as HsVT: maps of the stages 2 to 4, path aggregation (PAFPN), an anchor-free
    head. Where they have YOLOX's head, this has the maintained one of torchvision, FCOS. The differences: a cell is
    positive if it lies near a box's centre and its level fits the box's size, where YOLOX assigns by the cost of the
    prediction (SimOTA); classes have the focal loss where YOLOX has plain binary cross-entropy; boxes have the
    generalised IoU loss where it has IoU; "centerness" takes the place of objectness.

    Detections have the form that ``torchmetrics.detection.MeanAveragePrecision`` takes (it needs pycocotools).

    >>> import timm, torch
    >>> net = timm.create_model("hsvt_femto", in_chans=2, num_classes=0)
    >>> model = detector(net, num_classes=2, channels=32)
    >>> targets = [{"boxes": torch.tensor([[4.0, 4.0, 20.0, 20.0]]), "labels": torch.tensor([1])}]
    >>> losses, memory = model(torch.rand(1, 3, 2, 32, 32), targets)
    >>> sorted(losses), len(memory)
    (['bbox_ctrness', 'bbox_regression', 'classification'], 4)

    Args:
        net: a network with timm's ``forward_intermediates`` and ``feature_info``, such as those of
            :mod:`vitkit.models.backbones`; it is used as it is, not copied. One with ``stream`` takes its memory along.
        num_classes: K.
        stages: whose maps are read, finest first.
        channels: of the neck and the head, a multiple of 32 (the head's group norms). Default 96.
        options: of ``torchvision.models.detection.FCOS``: ``score_thresh``, ``nms_thresh``, ``detections_per_img`` …

    Raises: BadInput if the network has no stages or not those, or for other ``channels``.
    """
    info = getattr(net, "feature_info", None)
    if info is None or not hasattr(net, "forward_intermediates"):
        raise BadInput(f"{type(net).__name__} gives no maps of stages; use a network such as hsvt_tiny or resnet18.")
    if not stages or min(stages) < 0 or max(stages) >= len(info) or sorted(set(stages)) != list(stages):
        raise BadInput(f"stages={tuple(stages)} must rise and lie between 0 and {len(info) - 1}.")
    if channels < 32 or channels % 32:
        raise BadInput(f"channels={channels} of the detector's neck and head must be a multiple of 32, such as 96.")
    return PyramidDetector(net, num_classes, stages, channels, **options)
