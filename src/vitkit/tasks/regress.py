"""One or several numbers for an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional import mean_absolute_error, mean_squared_error, r2_score

from vitkit.errors import BadInput


class Regress:
    """Regression by squared error on standardised targets: ``mean((o − (y−μ)/σ)²)``, in float32.

    The mean over images is weighted by ``batch["weights"]``; missing targets (NaN) count neither there nor in scores.

    >>> import torch
    >>> task = Regress(1, mean=[10.0], std=[2.0])
    >>> float(task.loss(torch.tensor([[0.5]]), {"labels": torch.tensor([12.0])}))
    0.25
    >>> task.predict(torch.tensor([[0.5]]))
    tensor([[11.]])

    Args:
        num_targets: T ≥ 1 numbers an image.
        mean: μ of the training targets, T values; 0 leaves them as they are.
        std: σ of the training targets, T positive values. Without it, targets in the thousands train slowly.

    Raises: BadInput if an argument or a batch of labels does not fit.
    """

    main_metric = "r2"
    label_smoothing = 0.0
    class_weights = None
    multilabel = False
    classes: tuple[str, ...] = ()

    def __init__(
        self, num_targets: int = 1, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        if num_targets < 1:
            raise BadInput(f"num_targets={num_targets} must be at least 1.")
        self.num_targets = num_targets
        self.mean = tuple(mean) if mean is not None else (0.0,) * num_targets
        self.std = tuple(std) if std is not None else (1.0,) * num_targets
        if len(self.mean) != num_targets or len(self.std) != num_targets or min(self.std) <= 0:
            raise BadInput(
                f"mean={list(self.mean)} and std={list(self.std)} must be {num_targets} numbers each, std positive."
            )

    @property
    def num_outputs(self) -> int:
        return self.num_targets

    def targets(self, labels: Tensor) -> Tensor:
        """Labels (B,) or (B, T) → (B, T) floats in the user's unit."""
        values = labels.float()
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or values.shape[1] != self.num_targets:
            raise BadInput(f"Labels of shape {tuple(labels.shape)} do not fit {self.num_targets} targets an image.")
        return values

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        """Outputs (B, T) and ``batch["labels"]`` (B,) or (B, T) → scalar."""
        y = self.targets(batch["labels"])
        mean, std = y.new_tensor(self.mean), y.new_tensor(self.std)
        squared = (outputs.float() - ((y - mean) / std).nan_to_num()).square()
        share = self._share(batch)
        return (squared * share).sum() / share.sum().clamp(min=torch.finfo(torch.float32).tiny)

    def batch_weight(self, batch: dict[str, Any]) -> Tensor:
        """The scalar by which :meth:`loss` divides: the known targets, by the weights of their images."""
        return self._share(batch).sum()

    def _share(self, batch: dict[str, Any]) -> Tensor:
        share = (~self.targets(batch["labels"]).isnan()).float()
        if batch.get("weights") is not None:
            share = share * batch["weights"].to(share)[:, None]
        return share

    def predict(self, outputs: Tensor) -> Tensor:
        """Outputs (B, T) → values (B, T) in the user's unit."""
        return outputs.float() * outputs.new_tensor(self.std).float() + outputs.new_tensor(self.mean).float()

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Validation figures: R² (mean over targets), mean absolute error, root mean squared error."""
        values, truth = self.predict(outputs), self.targets(labels)
        rows = []
        for t in range(self.num_targets):
            known = ~truth[:, t].isnan()
            a, b = values[known, t].contiguous(), truth[known, t].contiguous()
            if not len(b):
                rows.append((float("nan"),) * 3)
                continue
            # R² compares with the spread of the targets, which one value has not
            r2 = float(r2_score(a, b)) if len(b) > 1 else float("nan")
            rows.append((r2, float(mean_absolute_error(a, b)), float(mean_squared_error(a, b))))
        count = len(rows)
        return {
            "r2": sum(r[0] for r in rows) / count,
            "mae": sum(r[1] for r in rows) / count,
            "rmse": sum(r[2] ** 0.5 for r in rows) / count,
        }
