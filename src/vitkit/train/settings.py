"""What a training run is told, in one frozen object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vitkit.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of :func:`vitkit.train.fit`; two runs with equal settings and data end in equal weights on one CPU.

    Args:
        epochs: passes over the training images, at least 1.
        batch_size: images a micro-batch; who builds the loader reads it, the loop takes batches as they come.
        lr: peak learning rate.
        weight_decay: decoupled decay of weight matrices; biases, norms, tokens and position tables get none.
        warmup_epochs: epochs of linear rise to ``lr`` (fractions allowed), at most ``epochs``.
        min_lr_ratio: the cosine ends at ``min_lr_ratio · lr``; in [0, 1].
        optimizer: ``adamw``, ``sgd``, ``sam``, ``asam``, ``friendly-sam``, ``zsharp`` or an optimizer of the catalogue.
        optimizer_options: keyword arguments of the optimizer, as a mapping or as pairs.
        precision: ``fp32``; ``bf16`` (autocast, weights stay float32); ``auto`` takes bf16 where the hardware computes
            it natively (on a CPU for networks wide enough to gain), and the attention path that measures fastest.
        ema_decay: decay of an exponential moving average of the weights in (0, 1), rising to its value over the first
            steps; validation and the final model use the average. None keeps none.
        accumulate: micro-batches a step.
        clip_grad: largest norm of the whole gradient; None does not clip.
        label_smoothing: in [0, 1); must agree with the task, which applies it.
        mixup: α of mixup's Beta(α, α); 0 is off.
        cutmix: α of CutMix's Beta(α, α); 0 is off. With both on, a fair coin decides for each batch.
        class_weights: classes are weighted; must agree with the task, which applies it.
        early_stop: stop after this many epochs without a better validation score, and keep the best epoch's weights.
        checkpoint_steps: steps between two checkpoints; one more is written at each epoch's end, unless the last is so
            recent that writing would take more than a twentieth of the time.
        seed: of everything random in the run.
        compile: compile the objective with ``torch.compile``.
        devices: processes, each with its own device.
        strategy: ``auto`` and ``ddp`` copy the model to every device, ``fsdp`` shards it.

    Raises: BadInput naming the setting, its value and what is allowed.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    min_lr_ratio: float = 0.01
    optimizer: str = "adamw"
    optimizer_options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = field(default_factory=dict)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    ema_decay: float | None = None
    accumulate: int = 1
    clip_grad: float | None = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    class_weights: bool = False
    early_stop: int | None = None
    checkpoint_steps: int = 200
    seed: int = 0
    compile: bool = False
    devices: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "checkpoint_steps", "devices"):
            self._require(name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "a whole number ≥ 1")
        self._require("seed", isinstance(self.seed, int) and self.seed >= 0, "a whole number ≥ 0")
        self._require("lr", math.isfinite(self.lr) and self.lr > 0, "positive")
        for name in ("weight_decay", "warmup_epochs", "mixup", "cutmix"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "zero or positive")
        self._require("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "in [0, 1]")
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        self._require("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "in (0, 1), or None")
        self._require("clip_grad", self.clip_grad is None or self.clip_grad > 0, "positive, or None")
        self._require("early_stop", self.early_stop is None or self.early_stop >= 1, "a whole number ≥ 1, or None")
        self._require("precision", self.precision in ("auto", "fp32", "bf16"), "auto, fp32 or bf16")
        self._require("strategy", self.strategy in ("auto", "ddp", "fsdp"), "auto, ddp or fsdp")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise BadInput(f"{name}={getattr(self, name)!r} must be {allowed}.")

    def options(self) -> dict[str, Any]:
        """The optimizer's options as a dict."""
        return dict(self.optimizer_options)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the checkpoint that must recognise its own run."""
        options = {k: v if isinstance(v, (str, int, float, type(None))) else repr(v) for k, v in self.options().items()}
        return {**asdict(self), "optimizer_options": options}
