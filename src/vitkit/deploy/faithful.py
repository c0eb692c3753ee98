"""Does an engine still answer like the model it was made from? Measured on images that chose nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitkit.errors import BadInput


@dataclass(frozen=True)
class Fidelity:
    """An engine's answers against the model's, on the same images.

    Attributes:
        drop: lost quality in points (percent), positive is worse. With labels: accuracy (R² for regression); without:
            how much the model itself expects to lose, by its own probabilities, where the engine chooses another class
            (the spread of the outputs' differences for regression).
        low, high: 95 % interval of ``drop`` (paired bootstrap over images).
        agreement: share of images with the same answer.
        max_logit_diff: largest difference of any logit.
        divergence: mean Kullback–Leibler divergence from the model's probabilities to the engine's, in nats.
        calibration_change: expected calibration error of the engine minus the model's (15 bins; needs labels), else
            None.
        quality: the engine's own accuracy or R² in percent; None without labels.
        labelled: whether there were labels.
        images: how many images.
    """

    drop: float
    low: float
    high: float
    agreement: float
    max_logit_diff: float
    divergence: float
    calibration_change: float | None
    quality: float | None
    labelled: bool
    images: int


def compare(
    reference: np.ndarray, engine: np.ndarray, labels: np.ndarray | None = None, task: str = "classify"
) -> Fidelity:
    """Compare logits (N, K) of an engine with those of the model.

    Args:
        reference, engine: (N, K).
        labels: class indices (N,), 0/1 (N, K) for "multilabel", values (N, K) for "regress"; None: unknown.
        task: "classify", "multilabel" or "regress".

    Raises: BadInput if the shapes differ or the engine returned numbers that are not finite.
    """
    if reference.shape != engine.shape:
        raise BadInput(f"the engine returns outputs of shape {engine.shape}, the model {reference.shape}.")
    if not np.isfinite(engine).all():
        raise BadInput("the engine returns outputs that are not finite.")
    gains = _loss_per_image(reference, engine, labels, task) * 100
    drop, low, high = _interval(gains)
    p, q = probabilities(reference, task), probabilities(engine, task)
    change = quality = None
    if labels is not None:
        if task == "classify":
            change = calibration_error(q, labels) - calibration_error(p, labels)
        quality = float(_quality_per_image(engine, labels, task).mean() * 100)
    return Fidelity(
        drop=drop,
        low=low,
        high=high,
        agreement=float(_same(reference, engine, task).mean()),
        max_logit_diff=float(np.abs(reference - engine).max()),
        divergence=_divergence(p, q, task),
        calibration_change=change,
        quality=quality,
        labelled=labels is not None,
        images=len(reference),
    )


def probabilities(logits: np.ndarray, task: str = "classify", temperature: float = 1.0) -> np.ndarray:
    """Softmax (sigmoid for "multilabel") of logits over a temperature; values of a regression stay as they are.

    >>> probabilities(np.array([[0.0, 0.0]])).tolist()
    [[0.5, 0.5]]
    """
    if task == "regress":
        return logits
    scaled = logits.astype(np.float64) / temperature
    if task == "multilabel":
        return 1 / (1 + np.exp(-np.clip(scaled, -60, 60)))
    raised = np.exp(scaled - scaled.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def calibration_error(probs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over bins of equal width.

    >>> calibration_error(np.array([[0.8, 0.2]] * 5), np.array([0, 0, 0, 0, 1]))
    0.0
    """
    confidence, right = probs.max(1), probs.argmax(1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(place, right - confidence, bins)
    return round(float(np.abs(gap).sum() / len(labels)), 12)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimises the negative log-likelihood of class indices, between 0.05 and 20.

    Paper: Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599.

    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(4000, 3))
    >>> drawn = (probabilities(z).cumsum(1) > rng.random((4000, 1))).argmax(1)
    >>> abs(fit_temperature(4 * z, drawn) - 4) < 0.4
    True
    """
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(labels))

    def loss(log_t: float) -> float:
        z = logits / np.exp(log_t)
        z = z - z.max(1, keepdims=True)
        return float((np.log(np.exp(z).sum(1)) - z[rows, labels]).mean())

    found = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(found.x))


def _loss_per_image(reference: np.ndarray, engine: np.ndarray, labels: np.ndarray | None, task: str) -> np.ndarray:
    if labels is not None:
        return _quality_per_image(reference, labels, task) - _quality_per_image(engine, labels, task)
    if task == "regress":
        spread = reference.var(0).sum() or 1.0
        return ((reference - engine) ** 2).sum(1) / spread
    p = probabilities(reference, task)
    if task == "multilabel":
        # where the engine flips an answer, the model expects to lose |2p − 1|
        flipped = (reference > 0) != (engine > 0)
        return (np.abs(2 * p - 1) * flipped).mean(1)
    rows = np.arange(len(p))
    return p.max(1) - p[rows, engine.argmax(1)]


def _quality_per_image(logits: np.ndarray, labels: np.ndarray, task: str) -> np.ndarray:
    if task == "classify":
        return (logits.argmax(1) == labels).astype(float)
    if task == "multilabel":
        return ((logits > 0) == (labels > 0.5)).mean(1)
    truth = labels.reshape(len(logits), -1)
    spread = truth.var(0).sum() or 1.0
    return 1 - ((logits - truth) ** 2).sum(1) / spread


def _same(reference: np.ndarray, engine: np.ndarray, task: str) -> np.ndarray:
    if task == "classify":
        return reference.argmax(1) == engine.argmax(1)
    if task == "multilabel":
        return ((reference > 0) == (engine > 0)).mean(1)
    return np.isclose(reference, engine, rtol=1e-2, atol=1e-2 * float(reference.std() or 1)).all(1)


def _divergence(p: np.ndarray, q: np.ndarray, task: str) -> float:
    if task == "regress":
        return 0.0
    tiny = 1e-12
    if task == "multilabel":
        p, q = np.stack([p, 1 - p], -1), np.stack([q, 1 - q], -1)
    return float((p * (np.log(p + tiny) - np.log(q + tiny))).sum(-1).mean())


def _interval(values: np.ndarray, rounds: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % percentile interval. Values that are nearly all zero get the rule of three's bound."""
    mean, count = float(values.mean()), len(values)
    rng = np.random.default_rng(seed)
    draws = values[rng.integers(0, count, (rounds, count))].mean(1)
    low, high = (float(v) for v in np.quantile(draws, [0.025, 0.975]))
    # no difference was seen: with 95 % confidence it is rarer than 3 in n
    if not values.any():
        bound = 100 * 3 / count
        low, high = -bound, bound
    return mean, low, high
