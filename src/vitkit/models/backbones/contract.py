"""timm's contract for a network, written once for all backbones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitkit.errors import BadInput

# B batch · C channels of a stage · H×W its map · K classes


class Backbone(nn.Module):
    """A network of stages with timm's outer methods: features, intermediates, head, classifier, checkpointing.

    A subclass calls ``super().__init__()``, builds ``self.stages`` (an ``nn.ModuleList``), calls :meth:`finish_init`,
    and writes

    - ``begin(images) -> state``: the stem; the state is whatever its stages understand,
    - ``as_map(state) -> (B, C, H, W)``: what a stage found, as a map,
    - ``features(state) -> Tensor``: the normalised features after the last stage, (B, C, H, W) or (B, N, C),
    - ``pool(features) -> (B, C)``: by ``self.global_pool``; "" leaves them as they are.

    A stage maps a state to a state. What belongs to the head is in ``self.head`` (a linear layer or identity) and may
    have ``self.head_norm`` before it.

    Attributes:
        num_features: C of ``forward_features``. head_hidden_size: width before the classifier. num_classes: K, 0 for
            none. feature_info: one entry a stage, as in timm.
        aux_sink: where parts put auxiliary losses while :func:`vitkit.models.vit.collect_aux` is active.
    """

    stages: nn.ModuleList
    num_features: int
    num_classes: int
    global_pool: str
    feature_info: list[dict[str, Any]]
    #: pooling modes; the first is the default
    pools: tuple[str, ...] = ("avg", "")

    def begin(self, images: Tensor) -> Any:
        raise NotImplementedError

    def as_map(self, state: Any) -> Tensor:
        raise NotImplementedError

    def features(self, state: Any) -> Tensor:
        raise NotImplementedError

    def pool(self, features: Tensor) -> Tensor:
        """Mean over places of a map or over tokens; "" leaves the features."""
        if self.global_pool == "":
            return features
        return mean_over_places(features)

    def finish_init(
        self,
        dims: list[int],
        reductions: list[int],
        num_classes: int,
        in_chans: int,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        num_features: int | None = None,
        head_width: int | None = None,
    ) -> None:
        """The head, and the facts timm asks for.

        Args:
            dims: C of every stage. reductions: pixels of the image per cell of its map.
            num_classes: K. in_chans: image channels. global_pool: one of ``pools``. drop_rate: before the classifier.
            num_features: channels of ``forward_features`` where they are not those of the last stage.
            head_width: width before the classifier where it is another.
        """
        self.num_features = num_features or dims[-1]
        self.head_hidden_size = head_width or self.num_features
        self.num_classes, self.in_chans = num_classes, in_chans
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]
        self._set_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.grad_checkpointing = False
        self.aux_sink: dict[tuple[str, int], Tensor] | None = None

    def _set_pool(self, global_pool: str | None) -> None:
        pool = self.pools[0] if global_pool is None else global_pool
        if pool not in self.pools:
            raise ValueError(f"global_pool={pool!r} of {type(self).__name__} must be one of {self.pools}.")
        self.global_pool = pool

    # -- forward ------------------------------------------------------------------------------------------------

    def step(self, stage: nn.Module, state: Any) -> Any:
        """One stage, recomputed in the backward pass if gradient checkpointing is on."""
        if self.grad_checkpointing and self.training:
            return checkpoint(stage, state, use_reentrant=False)
        return stage(state)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images → normalised features of the last stage, not pooled."""
        state = self.begin(x)
        for stage in self.stages:
            state = self.step(stage, state)
        return self.features(state)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features → logits (B, K), or what the classifier gets."""
        x = self.pool(x)
        norm = getattr(self, "head_norm", None)
        if norm is not None and self.global_pool:
            x = norm(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's feature extraction: maps (B, C, H, W) of the stages ``indices``.

        Args:
            x: images. indices: stages; a number takes that many last ones, None all.
            norm: the last stage's map as :meth:`features` has it; earlier stages have no norm of their own.
            stop_early: skip the stages behind the last one asked for. output_fmt: "NCHW" only.
            intermediates_only: leave out the final features.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not supported; stages give maps: 'NCHW'.")
        take, last = feature_take_indices(len(self.feature_info), indices)
        state, maps = self.begin(x), []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):  # type: ignore[arg-type]
            state = self.step(stage, state)
            if i in take:
                maps.append(self._normed_map(state) if norm and i == len(self.stages) - 1 else self.as_map(state))
        return maps if intermediates_only else (self.features(state), maps)

    def _normed_map(self, state: Any) -> Tensor:
        features = self.features(state)
        if features.ndim == 4:
            return features
        like = self.as_map(state)
        # prefix tokens come first
        return features[:, -like.shape[2] * like.shape[3] :].transpose(1, 2).reshape(like.shape)

    # -- timm's handles -----------------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last one of ``indices``, and the head."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "" if "" in self.pools else None)
        return take

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for ``num_classes`` classes (0: none), on the device of the network."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._set_pool(global_pool)
        like = next(self.parameters())
        head = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.head = head.to(like.device, like.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute stages in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups for layer-wise learning rates."""
        stem = r"^stem|^patch_embed|^pos_embed|^cls_token"
        return {"stem": stem, "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimizers leave out of weight decay."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in ("pos_embed", "cls_token")}


@torch.fx.wrap
def mean_over_places(features: Tensor) -> Tensor:
    """(B, C, H, W) or (B, N, C) → (B, C); one node of a torch.fx graph, which cannot ask for the number of axes."""
    return features.mean((2, 3)) if features.ndim == 4 else features.mean(1)


@torch.fx.wrap
def of_size(images: Tensor, size: tuple[int, int], name: str) -> Tensor:
    """The images (…, H, W) as they are; BadInput if ``size`` is not theirs.

    A module that imports it says ``torch.fx.wrap("of_size")``: a torch.fx graph cannot compare sizes.
    """
    height, width = images.shape[-2:]
    if (height, width) != size:
        raise BadInput(
            f"This {name} is built for images of {size[0]}×{size[1]} pixels, not {height}×{width}; resize them or "
            "give img_size."
        )
    return images


def init_weights(module: nn.Module) -> None:
    """Truncated normal for linear layers, He for convolutions, one and zero for norms; use with ``apply``."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create(
    cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    defaults: dict[str, Any],
    kwargs: dict[str, Any],
    out_indices: int | tuple[int, ...] = (0, 1, 2, 3),
) -> Any:
    """Build a registered network as timm builds its own (``features_only``, ``in_chans`` … included).

    Raises: ValueError if pretrained weights are asked for: there are none.
    """
    if pretrained:
        raise ValueError(f"{variant} has no pretrained weights; create it with pretrained=False.")
    feature_cfg = {"out_indices": out_indices, "feature_cls": "getter"}
    return build_model_with_cfg(cls, variant, False, feature_cfg=feature_cfg, **{**defaults, **kwargs})


def cfg(**changes: Any) -> dict[str, Any]:
    """timm's default config of a network without weights: 1,000 classes, 3×224×224, bicubic."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "classifier": "head",
        **changes,
    }
