"""Anomaly scores read off a classifier's outputs, and how well a score tells known from unknown.

Every score is higher for the more doubtful input. Arrays and tensors are taken; tensors come back in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitkit.errors import BadInput


def msp(probs: Any) -> Tensor:
    """1 − max_k p_k, the baseline of every detector: (N, K) → (N,).

    Paper: Hendrycks and Gimpel, arXiv:1610.02136. Departs from the paper: one minus it, so that doubt is high.
    """
    return 1 - probabilities(probs).max(1).values


def margin(probs: Any) -> Tensor:
    """1 − (p₍₁₎ − p₍₂₎), from the two largest probabilities: (N, K) → (N,)."""
    top = probabilities(probs).topk(2, dim=1).values
    return 1 - (top[:, 0] - top[:, 1])


def entropy(probs: Any) -> Tensor:
    """−Σ_k p_k log p_k in nats, 0 log 0 = 0: (N, K) → (N,)."""
    return torch.special.entr(probabilities(probs)).sum(1)


def energy(logits: Any, temperature: float = 1.0) -> Tensor:
    """−T log Σ_k exp(z_k / T): (N, K) → (N,).

    Args:
        logits: (N, K).
        temperature: T > 0.

    Paper: Liu et al., Energy-based Out-of-distribution Detection, arXiv:2010.03759, eq. 4.
    """
    if not temperature > 0:
        raise BadInput(f"temperature={temperature} must be positive.")
    return -temperature * (_matrix(logits, "logits") / temperature).logsumexp(1)


def scaled_msp(logits: Any, temperature: float) -> Tensor:
    """:func:`msp` of softmax(z / T), T usually from :func:`fit_temperature`: (N, K) → (N,)."""
    if not temperature > 0:
        raise BadInput(f"temperature={temperature} must be positive.")
    return 1 - (_matrix(logits, "logits") / temperature).softmax(1).max(1).values


def fit_temperature(logits: Any, labels: Any) -> float:
    """The T that minimises the negative log-likelihood of softmax(z / T) on held-out images, within [0.01, 100].

    The loss is convex in 1/T, so the one minimum is found by a bounded scalar search.

    Args:
        logits: (N, K) of images that were not trained on.
        labels: (N,) true classes.

    Paper: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599, §4.2.
    """
    from scipy.optimize import minimize_scalar

    z = _matrix(logits, "logits")
    y = classes(labels, z)

    def loss(log_t: float) -> float:
        return float(torch.nn.functional.cross_entropy(z / math.exp(log_t), y))

    found = minimize_scalar(loss, bounds=(math.log(0.01), math.log(100.0)), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))


def detection(scores: Any, unknown: Any) -> dict[str, float]:
    """How well a score separates unknown inputs (positives) from known ones.

    >>> detection([0.1, 0.2, 0.8, 0.9], [False, False, True, True])["auroc"]
    1.0

    Args:
        scores: (N,), higher = more doubtful.
        unknown: (N,) bool.

    Returns: ``auroc``; ``ap`` (average precision); ``fpr_at_95_tpr`` (known inputs refused when at least 95 % of the
        unknown are); ``tpr_at_1_fpr`` (unknown inputs caught when at most 1 % of the known are refused); ``eer``.
    Raises: BadInput if lengths differ, a score is not finite, or one of the two groups is empty.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    s = np.asarray(torch.as_tensor(scores).detach().cpu(), dtype=np.float64).reshape(-1)
    u = np.asarray(torch.as_tensor(unknown).detach().cpu()).astype(bool).reshape(-1)
    if s.shape != u.shape or not np.isfinite(s).all():
        raise BadInput(f"{s.size} scores and {u.size} marks of unknown inputs: they must match and be finite.")
    if u.all() or not u.any():
        raise BadInput(f"all {u.size} inputs are {'unknown' if u.all() else 'known'}; detection needs both.")
    fpr, tpr, _ = roc_curve(u, s, drop_intermediate=False)
    crossing = int(np.argmin(np.abs(fpr - (1 - tpr))))
    return {
        "auroc": float(roc_auc_score(u, s)),
        "ap": float(average_precision_score(u, s)),
        "fpr_at_95_tpr": float(fpr[tpr >= 0.95].min()),
        "tpr_at_1_fpr": float(tpr[fpr <= 0.01].max()),
        "eer": float((fpr[crossing] + 1 - tpr[crossing]) / 2),
    }


def accept_most_certain(scores: Any, coverage: float) -> Tensor:
    """Mark the round(coverage · N) least doubtful inputs, ties by index: (N,) → (N,) bool.

    Compares any score with a detector at the same coverage.
    """
    s = torch.as_tensor(scores).reshape(-1)
    if not 0 <= coverage <= 1:
        raise BadInput(f"coverage={coverage} must lie in [0, 1].")
    known = torch.zeros(len(s), dtype=torch.bool, device=s.device)
    known[s.argsort(stable=True)[: round(coverage * len(s))]] = True
    return known


def probabilities(values: Any) -> Tensor:
    """Probabilities (N, K) as float64.

    Raises: BadInput unless every row is a distribution over K ≥ 2 classes.
    """
    p = _matrix(values, "probs")
    worst = float((p.sum(1) - 1).abs().max()) if len(p) else 0.0
    # 1e-2: rows that were stored in half precision
    if bool((p < 0).any()) or worst > 1e-2:
        raise BadInput(
            f"probs must be softmax outputs: rows of non-negative numbers that sum to 1; the smallest is "
            f"{float(p.min()):.3g} and a row is off by {worst:.3g}. For logits use logits.softmax(-1)."
        )
    return p


def classes(labels: Any, like: Tensor) -> Tensor:
    """Labels (N,) int64 beside ``like`` (N, K)."""
    y = torch.as_tensor(labels, device=like.device).reshape(-1)
    if y.is_floating_point() or len(y) != len(like):
        raise BadInput(f"labels must be {len(like)} class numbers; got {len(y)} of {y.dtype}.")
    y = y.long()
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= like.shape[1]):
        raise BadInput(f"labels span {int(y.min())} … {int(y.max())}; there are {like.shape[1]} classes.")
    return y


def _matrix(values: Any, what: str) -> Tensor:
    found = torch.as_tensor(values).detach()
    if found.ndim != 2 or found.shape[1] < 2:
        raise BadInput(f"{what} must be (N, K) with K ≥ 2; got {tuple(found.shape)}.")
    if not bool(found.isfinite().all()):
        raise BadInput(f"{what} holds NaN or infinite values.")
    return found.double()
