"""The objective of learning from labels: a model, asked a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.models.labels import known_labels
from vitkit.models.vit import collect_aux


class Supervised(nn.Module):
    """``loss = task loss + Σ auxiliary losses of the model's parts``; the task loss is computed in float32.

    Parts that supervise inner layers see the labels where an image has one class, see
    :func:`vitkit.models.labels.known_labels`.

    Args:
        model: images (B, C, H, W) in [0, 1] → outputs (B, ``task.num_outputs``).
        task: :class:`~vitkit.tasks.Classify`, :class:`~vitkit.tasks.Regress` or anything with their methods.
        aux_loss_fn: ``f(model) -> scalar`` called after the forward, for models outside this package that keep
            auxiliary losses of their own; parts of a :class:`~vitkit.models.vit.ViT` need none.
    """

    def __init__(self, model: nn.Module, task: Any, aux_loss_fn: Callable[[nn.Module], Tensor] | None = None) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.aux_loss_fn = aux_loss_fn

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """``images``, ``labels`` and optionally ``weights`` → ``loss``, ``output`` and ``logs``."""
        # several labels at once, or numbers to predict, are no classes that a part could know what to do with
        single = bool(getattr(self.task, "classes", ())) and not getattr(self.task, "multilabel", False)
        with collect_aux(self.model) as aux, known_labels(self.model, batch["labels"] if single else None):
            output = self.model(batch["images"])
        with torch.autocast(output.device.type, enabled=False):
            task_loss = self.task.loss(output.float(), batch)
            terms = [value.float().sum() for value in aux.values()]
            if self.aux_loss_fn is not None:
                terms.append(self.aux_loss_fn(self.model).float())
        logs = {"task_loss": task_loss.detach()}
        if not terms:
            return {"loss": task_loss, "output": output, "logs": logs}
        extra = torch.stack(terms).sum()
        logs["aux_loss"] = extra.detach()
        return {"loss": task_loss + extra, "output": output, "logs": logs}

    def batch_weight(self, batch: dict[str, Any]) -> float:
        """By how much a batch counts among others: what the task's mean is divided by, else the number of images."""
        weigh = getattr(self.task, "batch_weight", None)
        return float(weigh(batch)) if callable(weigh) else float(len(batch["labels"]))

    def soft_labels(self, batch: dict[str, Any]) -> Tensor:
        """Targets (B, K) as floats, the form in which labels can be blended."""
        return self.task.targets(batch["labels"])

    def predict(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] → the outputs that validation scores."""
        return self.model(images)

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """What validation says of all outputs."""
        return self.task.score(outputs, labels)

    @torch.no_grad()
    def evaluate(self, loader: Iterable[dict[str, Any]]) -> dict[str, float]:
        """Loss and the task's scores over a loader, in eval mode; the mode is restored.

        Raises: ValueError if the loader gives no batch.
        """
        device = next(self.model.parameters()).device
        outputs, labels, weights = [], [], []
        was_training = self.training
        self.eval()
        try:
            for batch in loader:
                outputs.append(self.predict(batch["images"].to(device)).float().cpu())
                labels.append(batch["labels"])
                if batch.get("weights") is not None:
                    weights.append(batch["weights"])
        finally:
            self.train(was_training)
        if not outputs:
            raise ValueError("There is no batch to evaluate on; give a validation loader with at least one image.")
        output, label = torch.cat(outputs), torch.cat(labels)
        whole: dict[str, Any] = {"labels": label}
        if len(weights) == len(outputs):
            whole["weights"] = torch.cat(weights)
        # the caller's autocast would otherwise reach the loss over the whole set
        with torch.autocast("cpu", enabled=False):
            return {"loss": float(self.task.loss(output, whole)), **self.score(output, label)}
