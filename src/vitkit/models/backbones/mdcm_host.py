"""Pyramids read by MDCM's head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import cfg, create
from vitkit.models.cells import as_tokens
from vitkit.models.mdcm import Cues, Grid, MultiScaleCues

__all__ = ["MDCM"]

# B batch · S stages · D width of the heads · K classes


class MDCM(nn.Module):
    """A pyramid whose last stages are made to use different cues, and vote: see
    :class:`~vitkit.models.mdcm.MultiScaleCues`.

    Features are the stages' vectors z (B, S, D). In training the head's losses go to ``aux_sink``
    (:func:`vitkit.models.vit.collect_aux`); labels come by :func:`vitkit.models.labels.known_labels` or ``target``.

    >>> import timm, torch
    >>> pyramid = timm.create_model("convnext_atto", features_only=True)
    >>> MDCM(pyramid, num_classes=200, dim=64)(torch.rand(1, 3, 64, 64)).shape
    torch.Size([1, 200])

    Args:
        backbone: a timm network made with ``features_only=True`` (maps in NCHW or NHWC), or a whole one that has
            ``forward_intermediates``, whose own norm and head are then not read; ours are such networks too. Used as it
            is, not copied.
        num_classes: K. stages: which of its maps, fine to coarse; None: the last three, or all where there are fewer.
        head: options of :class:`~vitkit.models.mdcm.MultiScaleCues`.

    Shape: (B, C, H, W) → (B, num_classes).
    Raises: BadInput for a network without maps, or stages that it has not got.
    Paper: Multi-scale Activation, Refinement, and Aggregation: Exploring Diverse Cues for Fine-Grained Bird
        Recognition, arXiv:2504.09215. Its recipe is Swin-B at 384 or 448 pixels, 50 epochs, AdamW 5e-5 or SGD, random
        crops and flips.
    Departs from the paper: see the head.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, stages: Sequence[int] | None = None, **head: Any) -> None:
        super().__init__()
        info: Any = getattr(backbone, "feature_info", None)
        self.getter = not hasattr(info, "channels")
        if not info or (self.getter and not hasattr(backbone, "forward_intermediates")):
            raise BadInput(
                f"MDCM needs the maps of several stages, and {type(backbone).__name__} gives none; make one with "
                "timm.create_model(name, features_only=True)."
            )
        dims = [row["num_chs"] for row in info] if self.getter else list(info.channels())
        chosen = range(max(0, len(dims) - 3), len(dims)) if stages is None else stages
        self.picked = sorted({s % len(dims) for s in chosen if -len(dims) <= s < len(dims)})
        if len(self.picked) != len(list(chosen)) or not self.picked:
            raise BadInput(f"stages={stages} must be different numbers from 0 to {len(dims) - 1}, the pyramid's maps.")
        self.backbone = backbone
        self.nhwc = not self.getter and str(getattr(backbone, "output_fmt", "NCHW")).endswith("NHWC")
        self.head = MultiScaleCues([dims[s] for s in self.picked], num_classes, **head)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = len(self.picked) * self.head.dim
        self.aux_sink: dict[tuple[str, int], Tensor] | None = None

    # -- forward ------------------------------------------------------------------------------------------------

    def stage_tokens(self, x: Tensor) -> tuple[list[Tensor], list[Grid]]:
        """Images → tokens (B, N_s, D_s) and grids of the stages that are read."""
        if self.getter:
            maps = self.backbone.forward_intermediates(x, indices=self.picked, intermediates_only=True)  # type: ignore[operator]
        else:
            found = self.backbone(x)
            maps = [found[s] for s in self.picked]
        if self.nhwc:
            return [m.flatten(1, 2) for m in maps], [(m.shape[1], m.shape[2]) for m in maps]
        return [as_tokens(m) for m in maps], [(m.shape[2], m.shape[3]) for m in maps]

    def forward_features(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Images → vectors of the stages (B, S, D)."""
        aux = self.aux_sink if self.aux_sink is not None else {}
        return self.head.read(*self.stage_tokens(x), aux, target)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Vectors → logits (B, K), or all vectors in a row (B, S·D)."""
        return x.flatten(1) if pre_logits or not self.num_classes else self.head.answer(x)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        return self.forward_head(self.forward_features(x, target))

    @torch.no_grad()
    def cues(self, x: Tensor, target: Tensor | None = None) -> Cues:
        """Maps, gate and answers of the stages, in eval mode; ``target`` (B,) chooses the class of the maps."""
        was_training = self.training
        self.eval()
        try:
            return self.head.cues(*self.stage_tokens(x), target)
        finally:
            self.train(was_training)

    # -- timm's handles -----------------------------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        return self.head.classifiers

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh classifiers; with 0 the old ones go on selecting tokens, and the stages' vectors come out."""
        self.num_classes = num_classes
        if num_classes:
            self.head.reset(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the pyramid's activations in the backward pass instead of keeping them."""
        if hasattr(self.backbone, "set_grad_checkpointing"):
            self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]


default_cfgs = generate_default_cfgs(
    {
        "mdcm_femto": cfg(input_size=(3, 32, 32), pool_size=None),
        "mdcm_swin_tiny": cfg(),
        "mdcm_swin_base": cfg(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
        "mdcm_convnext_tiny": cfg(),
    }
)


@register_model
def mdcm_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels: a Swin of 4 stages and 5 blocks, 32 to 256 wide, windows of 4×4."""
    size = to_2tuple(kwargs.get("img_size") or 32)
    swin = {
        "img_size": 32,
        "patch_size": 1 if min(size) <= 16 else 2,
        "window_size": 4,
        "embed_dim": 32,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
    }
    head = {"dim": 128, "head_mlp_ratio": 2.0}
    return _create("mdcm_femto", "swin_tiny_patch4_window7_224", pretrained, {**swin, **head}, kwargs)


@register_model
def mdcm_swin_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """Swin-T at 224 pixels."""
    return _create("mdcm_swin_tiny", "swin_tiny_patch4_window7_224", pretrained, {}, kwargs)


@register_model
def mdcm_swin_base(pretrained: bool = False, **kwargs: Any) -> Any:
    """The paper's Swin-B at 384 pixels; 448 with ``img_size=448, window_size=14``."""
    return _create("mdcm_swin_base", "swin_base_patch4_window12_384", pretrained, {}, kwargs)


@register_model
def mdcm_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """ConvNeXt-T, for any image size."""
    # a convolutional network has no size of its own
    kwargs.pop("img_size", None)
    return _create("mdcm_convnext_tiny", "convnext_tiny", pretrained, {}, kwargs)


_HEAD = ("dim", "keep", "suppress", "top", "score", "gate", "diversity", "background", "stage_loss", "smoothing")


def _build(
    pyramid: str,
    weights: bool,
    num_classes: int = 1000,
    stages: Sequence[int] | None = None,
    head_mlp_ratio: float = 4.0,
    **options: Any,
) -> MDCM:
    """The pyramid by its timm name; what is no option of the head is the pyramid's."""
    options.pop("global_pool", None)
    head = {name: options.pop(name) for name in _HEAD if name in options} | {"mlp_ratio": head_mlp_ratio}
    net = timm.create_model(pyramid, pretrained=weights, features_only=True, **options)
    return MDCM(net, num_classes, stages, **head)


def _create(variant: str, pyramid: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("features_only"):
        raise BadInput(f"{variant} reads a pyramid's maps and has none of its own; take {pyramid} for features_only.")
    # weights are those of the pyramid, the head is always fresh
    return create(_build, variant, False, {"pyramid": pyramid, "weights": pretrained, **defaults}, kwargs)
