"""Downscaling: fields at a higher resolution than they were given in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional import pearson_corrcoef, r2_score
from torchmetrics.functional.image import structural_similarity_index_measure

from vitkit.errors import BadInput, unknown

# B samples · K targets · H×W cells of the fine grid

LOSSES = ("bayesian_tv", "mse", "mae", "quantile", "perceptual")
#: probabilities of −3σ … 3σ
QUANTILES = (0.0013, 0.0228, 0.1587, 0.5, 0.8413, 0.9772, 0.9987)
#: shares of the cells that the quantile errors leave out
EXTREMES = {"rmse_q68": 0.68, "rmse_q95": 0.95, "rmse_q99.7": 0.997}


class Downscale:
    """Fields of K variables, scored cell by cell: the paper's loss is a squared error with a prior of few edges.

    ``mean_{b,k,i,j} a_i w_k [(ŷ − y)² + λ (|∂_v ŷ| + |∂_h ŷ| + 0.7 |∂_d ŷ| + 0.7 |∂_a ŷ|)]`` on standardised targets
    (:func:`bayesian_tv`), with a_i = cos φ_i over its mean and w_k = 10 for temperatures, 1 for the rest. Cells whose
    truth is NaN (sea, missing stations) count neither there nor in the scores. Computed in float32.

    With :class:`~vitkit.train.Supervised` a training on pairs needs nothing else: batches hold ``images`` (B, V, h, w)
    and ``labels`` (B, K, H, W).

    Args:
        targets: names of the K variables.
        loss: "bayesian_tv", "mse", "mae" or "perceptual"; "quantile" is the pinball loss averaged over the quantiles
            from −3σ to 3σ, which for one prediction a cell is half the absolute error.
        prior: λ of "bayesian_tv".
        weights: w by name; those left out count 1. None: the paper's.
        latitudes: φ of the H fine rows in degrees; None: all rows count the same.
        mean, std: of the training targets, K values each; 0 and 1 leave them as they are.
        distance: for "perceptual", ``f(prediction, truth) -> Tensor`` such as LPIPS; the loss is the absolute error
            plus half its mean.

    Raises: BadInput or UnknownName if an argument or a batch does not fit.
    Paper: ORBIT-2: Scaling Exascale Vision Foundation Models for Weather and Climate Downscaling, arXiv:2505.04802.
    Departs from the paper: missing cells; which network measures the perceptual distance is left to the caller.
    """

    main_metric = "r2"
    label_smoothing = 0.0
    class_weights = None
    multilabel = False
    classes: tuple[str, ...] = ()

    def __init__(
        self,
        targets: Sequence[str],
        loss: str = "bayesian_tv",
        prior: float = 0.02,
        weights: Mapping[str, float] | None = None,
        latitudes: Sequence[float] | Tensor | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.names = tuple(targets)
        count = len(self.names)
        if not count or len(set(self.names)) != count:
            raise BadInput(f"targets={list(targets)} must name at least one variable and none twice.")
        if loss not in LOSSES:
            raise unknown("loss", loss, LOSSES, "vitkit.tasks.downscale.LOSSES")
        if (loss == "perceptual") != (distance is not None):
            raise BadInput("distance=… and loss='perceptual' go together; give both or neither.")
        for name in weights or {}:
            if name not in self.names:
                raise unknown("target", name, self.names, "task.names")
        self.kind, self.prior, self.distance = loss, float(prior), distance
        self.weights = tuple(
            float(weights.get(name, 1.0)) if weights is not None else 10.0 if "temperature" in name else 1.0
            for name in self.names
        )
        self.latitude = None if latitudes is None else latitude_weights(latitudes)
        self.mean = tuple(float(v) for v in mean) if mean is not None else (0.0,) * count
        self.std = tuple(float(v) for v in std) if std is not None else (1.0,) * count
        if len(self.mean) != count or len(self.std) != count or min(self.std) <= 0 or self.prior < 0:
            raise BadInput(
                f"mean={list(self.mean)} and std={list(self.std)} must be {count} numbers each, std positive, and "
                f"prior={prior} at least 0."
            )

    @property
    def num_outputs(self) -> int:
        return len(self.names)

    def targets(self, labels: Tensor) -> Tensor:
        """Labels (B, K, H, W) as floats in the user's units."""
        if labels.ndim != 4 or labels.shape[1] != len(self.names):
            raise BadInput(
                f"Labels of shape {tuple(labels.shape)} do not fit the targets {', '.join(self.names)}; give (B, "
                f"{len(self.names)}, H, W)."
            )
        if self.latitude is not None and len(self.latitude) != labels.shape[2]:
            raise BadInput(f"There are {len(self.latitude)} latitudes for fields of {labels.shape[2]} rows.")
        return labels.float()

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        """Outputs (B, K, H, W), standardised, and ``batch["labels"]`` in the user's units → scalar."""
        y = self.targets(batch["labels"])
        if outputs.shape != y.shape:
            raise BadInput(f"Outputs of shape {tuple(outputs.shape)} do not fit labels of shape {tuple(y.shape)}.")
        y, pred = (y - _column(y, self.mean)) / _column(y, self.std), outputs.float()
        weights, latitude = y.new_tensor(self.weights), None if self.latitude is None else self.latitude.to(y)
        known, share = ~y.isnan(), y.new_ones(())
        if batch.get("weights") is not None:
            weights = weights * batch["weights"].to(y)[:, None]
            # a mean over samples by their weights, as in the other tasks
            share = known.sum() / self.batch_weight(batch).clamp(min=torch.finfo(torch.float32).tiny)
        if self.kind in ("bayesian_tv", "mse"):
            return share * bayesian_tv(pred, y, self.prior if self.kind == "bayesian_tv" else 0.0, weights, latitude)
        gap = pred - y.nan_to_num()
        if self.kind == "quantile":
            q = y.new_tensor(QUANTILES)
            # a step above the truth costs 1 − q, one below it q
            each = torch.maximum(-gap[..., None] * q, gap[..., None] * (1 - q)).mean(-1)
        else:
            each = gap.abs()
        value = share * _mean(each, known, weights, latitude)
        if self.distance is not None:
            value = value + 0.5 * self.distance(pred, torch.where(known, y, pred.detach())).mean()
        return value

    def batch_weight(self, batch: dict[str, Any]) -> Tensor:
        """The scalar by which :meth:`loss` divides: the cells whose truth is known, by the weights of their samples."""
        known = (~self.targets(batch["labels"]).isnan()).float().sum((1, 2, 3))
        return (known if batch.get("weights") is None else known * batch["weights"].to(known)).sum()

    def predict(self, outputs: Tensor) -> Tensor:
        """Outputs (B, K, H, W) → fields in the user's units."""
        outputs = outputs.float()
        return outputs * _column(outputs, self.std) + _column(outputs, self.mean)

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """:func:`field_metrics` in the user's units: means over targets, and R² and RMSE of each."""
        return field_metrics(self.predict(outputs), self.targets(labels), self.names, self.latitude)


def total_variation(fields: Tensor) -> Tensor:
    """``|∂_v| + |∂_h| + 0.7 |∂_d| + 0.7 |∂_a|``: differences to the next cell down, right and on both diagonals.

    >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
    tensor([[[[1.7000, 0.7000],
              [1.0000, 0.0000]]]])

    A difference is written at its upper left cell (that of the other diagonal at its upper right one); one that would
    leave the field counts 0.

    Shape: (B, K, H, W) → the same.
    """
    here, right, below = fields[..., :-1, :-1], fields[..., :-1, 1:], fields[..., 1:, :-1]
    down = F.pad((fields[..., 1:, :] - fields[..., :-1, :]).abs(), (0, 0, 0, 1))
    across = F.pad((fields[..., 1:] - fields[..., :-1]).abs(), (0, 1))
    diagonal = F.pad((fields[..., 1:, 1:] - here).abs(), (0, 1, 0, 1))
    other = F.pad((below - right).abs(), (1, 0, 0, 1))
    return down + across + 0.7 * (diagonal + other)


def bayesian_tv(
    pred: Tensor,
    y: Tensor,
    prior: float = 0.02,
    weights: Tensor | None = None,
    latitude: Tensor | None = None,
) -> Tensor:
    """``mean a_i w_k [(ŷ − y)² + λ TV(ŷ)]``: squared error, and a prior that real fields have few edges.

    Args:
        pred, y: (B, K, H, W); cells where ``y`` is NaN do not count.
        prior: λ; 0 is the mean squared error.
        weights: w, (K,) or (B, K). latitude: a, (H,), see :func:`latitude_weights`.

    Returns: scalar, the mean over known cells.
    Raises: BadInput if the shapes differ.
    Paper: ORBIT-2, arXiv:2505.04802.
    """
    if pred.shape != y.shape or pred.ndim != 4:
        raise BadInput(f"Prediction {tuple(pred.shape)} and truth {tuple(y.shape)} must both be (B, K, H, W).")
    each = (pred - torch.where(y.isnan(), pred.detach(), y)).square()
    if prior:
        each = each + prior * total_variation(pred)
    return _mean(each, ~y.isnan(), weights, latitude)


def latitude_weights(latitudes: Sequence[float] | Tensor) -> Tensor:
    """cos φ over its mean, (H,), for φ in degrees: what share of the sphere the cells of a row cover.

    Raises: BadInput if a latitude is beyond the poles, or all are at them.
    """
    phi = torch.as_tensor(latitudes, dtype=torch.float64).reshape(-1)
    if not len(phi) or not bool((phi.abs() <= 90).all()) or float(phi.abs().min()) > 89.999:
        raise BadInput("latitudes must be degrees from -90 to 90, at least one of them off the poles.")
    weights = torch.deg2rad(phi).cos().clamp(min=0)
    return (weights / weights.mean()).float()


@torch.no_grad()
def field_metrics(
    pred: Tensor, y: Tensor, names: Sequence[str] | None = None, latitude: Tensor | None = None
) -> dict[str, float]:
    """Agreement of fields with the truth, over known cells; means over targets.

    Args:
        pred, y: (B, K, H, W) in the same units. names: of the K targets, for ``r2/NAME`` and ``rmse/NAME``.
        latitude: (H,), see :func:`latitude_weights`; None: ``weighted_rmse`` is ``rmse``.

    Returns: ``r2`` and ``pearson`` over all cells of all samples; ``rmse`` and ``weighted_rmse``, the root over the
        cells of a sample, then the mean over samples; ``ssim``, with the range of the truth as the scale and missing
        cells taken from the truth's mean in both (NaN below 3 cells a side); ``rmse_q68``, ``rmse_q95`` and
        ``rmse_q99.7``, over the cells whose truth lies above that quantile of the truth.
    """
    pred, y = pred.float(), y.float()
    names = [str(k) for k in range(y.shape[1])] if names is None else names
    found: dict[str, list[float]] = {}
    for k, name in enumerate(names):
        for metric, value in _of_one(pred[:, k], y[:, k], latitude).items():
            found.setdefault(metric, []).append(value)
            if metric in ("r2", "rmse"):
                found[f"{metric}/{name}"] = [value]
    return {metric: sum(values) / len(values) for metric, values in found.items()}


def _of_one(pred: Tensor, y: Tensor, latitude: Tensor | None) -> dict[str, float]:
    known = ~y.isnan()
    a, b = pred[known], y[known]
    nan = float("nan")
    enough = len(b) > 1 and float(b.std()) > 0
    rows = known.float() if latitude is None else known * latitude.to(y)[:, None]
    squared = (pred - torch.where(known, y, pred)).square()
    seen = known.flatten(1).any(1)
    root = (squared.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)).sqrt()[seen]
    weighted = ((squared * rows).flatten(1).sum(1) / rows.flatten(1).sum(1).clamp(min=1e-12)).sqrt()[seen]
    found = {
        "r2": float(r2_score(a, b)) if enough else nan,
        "rmse": float(root.mean()),
        "weighted_rmse": float(weighted.mean()),
        "pearson": float(pearson_corrcoef(a, b)) if enough and float(a.std()) > 0 else nan,
        "ssim": _ssim(pred, y, known) if enough else nan,
    }
    for metric, share in EXTREMES.items():
        # torch.quantile takes 16 million values at most
        above = b > b.kthvalue(int(share * (len(b) - 1)) + 1).values if len(b) else b > 0
        found[metric] = float((a[above] - b[above]).square().mean().sqrt())
    return found


def _ssim(pred: Tensor, y: Tensor, known: Tensor) -> float:
    reach = (min(y.shape[-2:]) - 1) // 2
    if reach < 1:
        return float("nan")
    middle, extent = y[known].mean(), float(y[known].max() - y[known].min())
    a, b = (torch.where(known, field, middle)[:, None] for field in (pred, y))
    # the window reaches ⌊3.5 σ + 0.5⌋ cells to each side and must leave at least one cell inside
    value = structural_similarity_index_measure(a, b, sigma=min(1.5, reach / 3.5), data_range=extent)
    return float(torch.as_tensor(value))


def _mean(each: Tensor, known: Tensor, weights: Tensor | None, latitude: Tensor | None) -> Tensor:
    if weights is not None:
        each = each * weights[..., None, None]
    if latitude is not None:
        each = each * latitude[:, None]
    # no known cell at all gives loss 0, not 0/0
    return torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return like.new_tensor(values)[:, None, None]
