"""One label, or several, for an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional import classification as metrics

from vitkit.errors import BadInput


def balanced_weights(counts: Sequence[float]) -> list[float]:
    """Class weights ``n / (K·n_k)``: every class contributes the same to the loss, and the mean over images is 1.

    >>> balanced_weights([30, 10])
    [0.6666666666666666, 2.0]

    Raises: BadInput if a class has no image.
    """
    if min(counts, default=0) <= 0:
        raise BadInput(f"Class weights need at least one training image of every class; the counts are {list(counts)}.")
    total = sum(counts)
    return [total / (len(counts) * count) for count in counts]


class Classify:
    """Classification: cross-entropy over classes, or one yes/no question for each of several labels.

    Single label: ``−Σ_k w_k ỹ_k log softmax(o)_k``, ``ỹ = (1−s)·y + s/K``; multi-label:
    ``−Σ_k w_k [ỹ_k log σ(o_k) + (1−ỹ_k) log(1−σ(o_k))] / K``, ``ỹ = (1−s)·y + s/2``. The batch loss is the mean over
    images, weighted by the class weight of the label (single label, as in ``torch.nn.CrossEntropyLoss``) and by
    ``batch["weights"]``. Computed in float32.

    >>> import torch
    >>> task = Classify(["cat", "dog"])
    >>> round(float(task.loss(torch.tensor([[2.0, 0.0]]), {"labels": torch.tensor([0])})), 3)
    0.127

    Args:
        classes: names of the outputs; their number is K ≥ 2 (multi-label: K ≥ 1).
        multilabel: an image may have any number of the labels; they come as (B, K) of 0 and 1.
        label_smoothing: s in [0, 1).
        class_weights: K non-negative factors w.

    Raises: BadInput if an argument or a batch of labels does not fit.
    """

    main_metric = "accuracy"

    def __init__(
        self,
        classes: Sequence[str],
        multilabel: bool = False,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        self.classes = tuple(str(c) for c in classes)
        if len(self.classes) < (1 if multilabel else 2):
            raise BadInput(f"Classification needs at least two classes; got {list(self.classes)}.")
        if not 0 <= label_smoothing < 1:
            raise BadInput(f"label_smoothing={label_smoothing} must be in [0, 1).")
        if class_weights is not None and (len(class_weights) != len(self.classes) or min(class_weights) < 0):
            raise BadInput(f"class_weights={list(class_weights)} must be {len(self.classes)} numbers ≥ 0, one a class.")
        self.multilabel = multilabel
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else tuple(float(w) for w in class_weights)

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    def targets(self, labels: Tensor) -> Tensor:
        """Labels as (B, K) floats: one-hot of class numbers; probabilities and indicators as they are."""
        if labels.ndim == 2 and labels.shape[1] == self.num_outputs:
            return labels.float()
        if self.multilabel or labels.ndim != 1 or labels.is_floating_point():
            raise BadInput(
                f"Labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit {self.num_outputs} "
                f"{'labels' if self.multilabel else 'classes'}; give (B, {self.num_outputs}) floats"
                f"{'' if self.multilabel else ' or (B,) class numbers'}."
            )
        return F.one_hot(labels, self.num_outputs).float()

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        """Outputs (B, K) and ``batch["labels"]`` (class numbers or (B, K)) → scalar."""
        outputs, labels = outputs.float(), batch["labels"]
        weights = self._tensor(outputs)
        if self.multilabel:
            y = self.targets(labels) * (1 - self.label_smoothing) + self.label_smoothing / 2
            each = F.binary_cross_entropy_with_logits(outputs, y, weight=weights, reduction="none").mean(1)
        else:
            y = labels if labels.ndim == 1 and not labels.is_floating_point() else self.targets(labels)
            each = F.cross_entropy(outputs, y, weight=weights, reduction="none", label_smoothing=self.label_smoothing)
        if batch.get("weights") is not None:
            each = each * batch["weights"].to(each)
        # no weight at all (every image switched off) gives loss 0, not 0/0
        return each.sum() / self.batch_weight(batch).clamp(min=torch.finfo(torch.float32).tiny)

    def batch_weight(self, batch: dict[str, Any]) -> Tensor:
        """The scalar by which :meth:`loss` divides: the images, by the weights of their classes and their own."""
        labels = batch["labels"]
        share = torch.ones(len(labels), device=labels.device)
        weights = self._tensor(labels)
        if weights is not None and not self.multilabel:
            # a mixed label weighs as much as the classes it is made of
            share = weights[labels] if labels.ndim == 1 else self.targets(labels) @ weights
        if batch.get("weights") is not None:
            share = share * batch["weights"].to(share)
        return share.sum()

    def predict(self, outputs: Tensor) -> Tensor:
        """Outputs (B, K) → probabilities (B, K)."""
        return outputs.float().sigmoid() if self.multilabel else outputs.float().softmax(-1)

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Validation figures: accuracy and macro F1; for several labels also the mean average precision.

        Multi-label accuracy is the share of right yes/no answers at probability 0.5.
        """
        outputs, count = outputs.float(), self.num_outputs
        if self.multilabel:
            truth = (self.targets(labels) > 0.5).long()
            shared: dict[str, Any] = {"num_labels": count}
            # a label that no image has makes its precision undefined; torchmetrics leaves it out of the mean
            return {
                "accuracy": float(((outputs > 0).long() == truth).double().mean()),
                "macro_f1": float(metrics.multilabel_f1_score(outputs.sigmoid(), truth, **shared)),
                "map": float(metrics.multilabel_average_precision(outputs.sigmoid(), truth, **shared)),
            }
        truth = labels if labels.ndim == 1 else labels.argmax(-1)
        shared = {"num_classes": count}
        return {
            "accuracy": float(metrics.multiclass_accuracy(outputs, truth, average="micro", **shared)),
            "macro_f1": float(metrics.multiclass_f1_score(outputs, truth, average="macro", **shared)),
        }

    def _tensor(self, like: Tensor) -> Tensor | None:
        return None if self.class_weights is None else torch.tensor(self.class_weights, device=like.device)
