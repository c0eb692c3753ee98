"""Softmax-space rejection: an answer far from the usual answers of its class becomes "not known"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vitkit.errors import BadInput
from vitkit.stress.ood.scores import classes, msp, probabilities

#: why a class has the threshold it has
ERRORS, NO_ERRORS, NO_CORRECT = "errors", "no errors", "no correct answers"
REFUSED, ALL = "risk not reached", "all accepted"
# a distance computed in another batch may differ in the last bits: thresholds stand this far off their data
_SLACK = 1e-12
_NUM_QUANTILES = 21


@dataclass(frozen=True, kw_only=True)
class SoftmaxRejection:
    """A fitted detector; made by :func:`softmax_rejection`.

    Attributes:
        centroids: (K, K) float64, row k the usual softmax vector of class k.
        thresholds: (K,) float64, distance below which an answer k is given.
        reasons: K words: "errors" (threshold from wrong answers), "no errors" (largest distance of a correct
            answer), "no correct answers" (nothing is accepted); with ``max_risk`` also "risk not reached" (nothing is
            accepted) and "all accepted".
        quantile: of the distances of wrong answers that the thresholds stand for.
        risk_bound: upper bound on the share of errors among accepted answers, 0 if none is accepted; NaN where no bound
            was asked for.
    """

    centroids: Tensor
    thresholds: Tensor
    reasons: tuple[str, ...]
    quantile: float
    risk_bound: float = math.nan

    def predict(self, probs: Any) -> tuple[Any, Any, Any]:
        """Answer, or refuse.

        Args:
            probs: (N, K) softmax outputs, array or tensor.

        Returns: labels (N,) int64, known (N,) bool, distance (N,) float64 in [0, √2]; NumPy arrays for an array, else
            tensors.
        Raises: BadInput if K differs from the fit or rows are not distributions.
        """
        p = self._given(probs)
        distance, labels = _distance(p, self.centroids.to(p.device))
        known = distance < self.thresholds.to(p.device)[labels]
        return (
            (labels, known, distance)
            if isinstance(probs, Tensor)
            else (labels.numpy(), known.numpy(), distance.numpy())
        )

    def score(self, probs: Any) -> Tensor:
        """Doubt of each answer (N,), higher = more doubtful: the distance to the centroid of the predicted class."""
        p = self._given(probs)
        return _distance(p, self.centroids.to(p.device))[0]

    def _given(self, probs: Any) -> Tensor:
        p = probabilities(probs)
        if p.shape[1] != len(self.centroids):
            raise BadInput(f"probs have {p.shape[1]} classes; the detector was fitted on {len(self.centroids)}.")
        return p


def softmax_rejection(
    probs_cal: Any,
    labels_cal: Any,
    quantile: float = 0.0,
    centroid: Literal["mean", "kmeans"] = "mean",
    max_risk: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> SoftmaxRejection:
    """Learn when an answer should be "not known", from how softmax vectors of right and wrong answers lie.

    With ŷ the predicted class, ``c_k`` the mean of p over samples predicted k and correct::

        d(x) = ‖p(x) − c_ŷ‖₂,   T_k = min { d(x) : predicted k, wrong },   answer ŷ if d(x) < T_ŷ, else "not known"

    Other than a bound on the top probability the distance has two sides: an answer much surer than is usual for its
    class is far from the centroid too, and refused. On a model that is rarely sure this costs accuracy at equal
    coverage (see the evidence); where nearly all correct answers are near one-hot the two rules agree.

    >>> import numpy as np
    >>> p = np.array([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.1, 0.9]])
    >>> fitted = softmax_rejection(p, np.array([0, 0, 1, 1]))
    >>> fitted.predict(p)[1].tolist()      # the third is wrong, so it and anything farther out is refused
    [True, True, False, True]

    Args:
        probs_cal: (N, K) softmax outputs on calibration images, best ones the model was not trained on.
        labels_cal: (N,) their true classes.
        quantile: q in [0, 1]: T_k may pass at most this share of the class's wrong answers; 0 passes none.
        centroid: "mean" as above, or "kmeans": k-means over all softmax vectors, started at the one-hot vertices.
        max_risk: choose q instead, so that the share of errors among accepted answers stays below this with
            ``confidence``. One half of the data sets centroids and thresholds, the other gives one-sided
            Clopper–Pearson bounds of 21 quantiles and of accepting all, at (1 − confidence)/22 each; the passing one
            that accepts most is taken.
        confidence: of that bound, in (0, 1).
        seed: of the halving.

    Returns: a :class:`SoftmaxRejection`.
    Raises: BadInput for rows that are not distributions, labels that do not fit, settings out of range, or both
        ``quantile`` and ``max_risk``.
    Paper: Explorations of the Softmax Space: Knowing When the Neural Network Doesn't Know, arXiv:2502.00456.
    Departs from the paper: the paper's threshold is q = 0; quantile and risk bound are additions. A class without
        errors accepts up to (and including) the farthest of its correct answers; a class without correct answers
        gets the vertex as centroid and accepts nothing. Both are told in ``reasons``.
    """
    p = probabilities(probs_cal)
    y = classes(labels_cal, p)
    if not len(p):
        raise BadInput("softmax_rejection needs calibration samples; there are none.")
    if not 0 <= quantile <= 1:
        raise BadInput(f"quantile={quantile} must lie in [0, 1].")
    if centroid not in ("mean", "kmeans"):
        raise BadInput(f"centroid={centroid!r}: use 'mean' or 'kmeans'.")
    if max_risk is None:
        return _fit(p, y, quantile, centroid)
    if quantile:
        raise BadInput(f"quantile={quantile} and max_risk={max_risk}: give one; the risk chooses the quantile.")
    if not 0 < max_risk < 1 or not 0 < confidence < 1:
        raise BadInput(f"max_risk={max_risk} and confidence={confidence} must lie strictly between 0 and 1.")
    return _fit_to_risk(p, y, centroid, max_risk, confidence, seed)


@dataclass(frozen=True, kw_only=True)
class SelectiveReport:
    """What refusing answers costs and saves.

    Attributes:
        n: inputs.
        coverage: share that is answered.
        accuracy: of all answers, if none were refused.
        selective_accuracy: of the given answers; NaN if none is given.
        errors_caught: share of the wrong answers that were refused; NaN if there are none.
        correct_rejected: share of the correct answers that were refused; NaN if there are none.
        aurc: mean error over all coverages when the most doubtful go first; lower is better.
    """

    n: int
    coverage: float
    accuracy: float
    selective_accuracy: float
    errors_caught: float
    correct_rejected: float
    aurc: float


def selective_report(probs: Any, labels: Any, known: Any, doubt: Any = None) -> SelectiveReport:
    """Coverage and accuracy of the given answers, and the area under the risk–coverage curve.

    Args:
        probs: (N, K) softmax outputs.
        labels: (N,) true classes.
        known: (N,) bool, which answers are given.
        doubt: (N,) score that orders the curve, higher = refused earlier; one minus the top probability if None.

    Raises: BadInput if lengths differ or nothing is given.
    """
    p = probabilities(probs)
    y = classes(labels, p)
    given = torch.as_tensor(known, device=p.device).reshape(-1).bool()
    order = msp(p) if doubt is None else torch.as_tensor(doubt, device=p.device).double().reshape(-1)
    if not len(p) or len(given) != len(p) or len(order) != len(p):
        raise BadInput(f"{len(p)} probs, {len(given)} known, {len(order)} doubt: they must match and not be empty.")
    right = p.argmax(1) == y
    return SelectiveReport(
        n=len(p),
        coverage=_share(given),
        accuracy=_share(right),
        selective_accuracy=_share(right[given]),
        errors_caught=_share(~given[~right]),
        correct_rejected=_share(~given[right]),
        aurc=float(risk_coverage(order, ~right)[1].mean()),
    )


def risk_coverage(doubt: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Risk (share of errors) among the i least doubtful, i = 1 … N: coverages (N,), risks (N,).

    Inputs of equal doubt each count as the mean error of their group: the expectation over random orders of ties.
    """
    order = doubt.argsort(stable=True)
    _, group, sizes = torch.unique_consecutive(doubt[order], return_inverse=True, return_counts=True)
    errors = torch.zeros(len(sizes), dtype=torch.float64, device=doubt.device)
    errors.index_add_(0, group, wrong[order].double())
    count = torch.arange(1, len(doubt) + 1, dtype=torch.float64, device=doubt.device)
    return count / len(doubt), (errors / sizes)[group].cumsum(0) / count


def clopper_pearson_upper(errors: int, n: int, alpha: float) -> float:
    """One-sided upper bound at level 1 − α of a probability that was seen ``errors`` times in ``n``; 1 for n = 0.

    >>> round(clopper_pearson_upper(0, 59, 0.05), 4)
    0.0495
    """
    from scipy.stats import beta

    return 1.0 if errors >= n else float(beta.ppf(1 - alpha, errors + 1, n - errors))


def _fit(p: Tensor, y: Tensor, quantile: float, centroid: str) -> SoftmaxRejection:
    centroids = _centroids(p, y, centroid)
    thresholds, reasons = _thresholds(p, y, centroids, quantile)
    return SoftmaxRejection(centroids=centroids, thresholds=thresholds, reasons=reasons, quantile=quantile)


def _distance(p: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    labels = p.argmax(1)
    # rows stored in half precision may sum to a little over 1
    return torch.linalg.vector_norm(p - centroids[labels], dim=1).clamp(max=math.sqrt(2)), labels


def _centroids(p: Tensor, y: Tensor, centroid: str) -> Tensor:
    predicted = p.argmax(1)
    vertices = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    right = predicted == y
    means = _group_means(p[right], predicted[right], vertices)
    if centroid == "mean":
        return means
    found = vertices
    for _ in range(300):
        moved = _group_means(p, torch.cdist(p, found).argmin(1), vertices)
        if torch.equal(moved, found):
            break
        found = moved
    answered = torch.bincount(predicted[right], minlength=len(vertices)) > 0
    return torch.where(answered[:, None], found, vertices)


def _group_means(p: Tensor, group: Tensor, empty: Tensor) -> Tensor:
    """Mean row of each group; the row of ``empty`` for a group without members."""
    counts = torch.bincount(group, minlength=len(empty))[:, None]
    sums = torch.zeros_like(empty).index_add_(0, group, p)
    return torch.where(counts > 0, sums / counts.clamp_min(1), empty)


def _thresholds(p: Tensor, y: Tensor, centroids: Tensor, quantile: float) -> tuple[Tensor, tuple[str, ...]]:
    distance, predicted = _distance(p, centroids)
    right = predicted == y
    thresholds = torch.zeros(len(centroids), dtype=p.dtype, device=p.device)
    reasons: list[str] = []
    for k in range(len(centroids)):
        wrong, correct = distance[(predicted == k) & ~right], distance[(predicted == k) & right]
        if not len(correct):
            reasons.append(NO_CORRECT)
        elif not len(wrong):
            thresholds[k] = correct.max() + _SLACK
            reasons.append(NO_ERRORS)
        else:
            # rounded down to a seen distance: d < T then passes at most the share q of the wrong answers
            thresholds[k] = torch.quantile(wrong, quantile, interpolation="lower") - _SLACK
            reasons.append(ERRORS)
    return thresholds, tuple(reasons)


def _fit_to_risk(
    p: Tensor, y: Tensor, centroid: str, max_risk: float, confidence: float, seed: int
) -> SoftmaxRejection:
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(seed)).to(p.device)
    # thresholds that were set on a sample say nothing about errors in that sample, so another one judges them
    fit, judge = order[: len(p) // 2], order[len(p) // 2 :]
    centroids = _centroids(p[fit], y[fit], centroid)
    distance, predicted = _distance(p[judge], centroids)
    wrong = predicted != y[judge]
    tried = [(q, *_thresholds(p[fit], y[fit], centroids, q)) for q in np.linspace(0, 1, _NUM_QUANTILES).tolist()]
    everything = torch.full((len(centroids),), math.inf, dtype=p.dtype, device=p.device)
    tried.append((1.0, everything, (ALL,) * len(centroids)))
    alpha = (1 - confidence) / len(tried)
    best = SoftmaxRejection(
        centroids=centroids,
        thresholds=torch.zeros_like(everything),
        reasons=(REFUSED,) * len(centroids),
        quantile=0.0,
        risk_bound=0.0,
    )
    most = 0
    for q, thresholds, reasons in tried:
        given = distance < thresholds[predicted]
        accepted = int(given.sum())
        bound = clopper_pearson_upper(int((given & wrong).sum()), accepted, alpha)
        if bound <= max_risk and accepted > most:
            most = accepted
            best = SoftmaxRejection(
                centroids=centroids, thresholds=thresholds, reasons=reasons, quantile=q, risk_bound=bound
            )
    return best


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if len(mask) else math.nan
