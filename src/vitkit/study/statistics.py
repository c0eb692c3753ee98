"""How sure a study is: measures with intervals, paired tests, calibration, rejection, Pareto fronts.

All functions are pure and take NumPy arrays. Predictions of several seeds on the same test images have shape
(S, N, …); cross-validation gives a *list*, one entry per fold, and its out-of-fold predictions are pooled, so
that every image counts once.

Where intervals come from. Test images are drawn with replacement (whole groups, e.g. patients, where groups
are given), and seeds are drawn apart from them; the two deviations are added. Drawing both at once would
count the interaction of image and seed up to three times and make every interval too wide. Of S seeds S − 1
are drawn, because drawing S understates the spread of a mean by (S − 1)/S (Rao & Wu 1988). The distribution
is shifted to have the estimate as its mean: a resampled calibration error is nearly always larger than the
observed one, and the uncorrected interval would often not contain the estimate. With two or three seeds the
spread between seeds is itself poorly known, and the interval says little about seeds not run.

The same images are drawn for every recipe (same seed, same number of images).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse, stats

from vitkit.errors import BadInput
from vitkit.study.results import (
    Comparison,
    Interval,
    RejectionPoint,
    ReliabilityBin,
)

Array = NDArray[Any]
#: weights (N, B), how often each image was drawn in each of B resamples -> value of the measure (B,)
Statistic = Callable[[Array], Array]

RESAMPLES = 2000
LEVEL = 0.95
#: image × class × seed × resample operations spent on the intervals of one AUROC
_AUROC_WORK = 4e9


# ---- resampling


def resample_weights(
    num_images: int, resamples: int = RESAMPLES, *, seed: int = 0, groups: ArrayLike | None = None
) -> Iterator[Array]:
    """Yield weights (N, B'), B' summing to ``resamples``: how often each image is in each bootstrap sample.

    Args:
        num_images: N.
        resamples: number of bootstrap samples B.
        seed: of the generator; the same seed and N draw the same images, so recipes stay paired.
        groups: (N,) group of each image; whole groups are drawn (a patient's images are not independent).
    """
    rng = np.random.default_rng(seed)
    member = None
    units = num_images
    if groups is not None:
        labels, member = np.unique(np.asarray(groups), return_inverse=True)
        if len(member) != num_images:
            raise BadInput(f"{len(member)} groups were given for {num_images} images.")
        units = len(labels)
    # chunks of about 8 MB stay in cache: the products below are bound by memory traffic
    chunk = max(16, min(resamples, 2_000_000 // max(units, 1)))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = rng.integers(0, units, (size, units))
        flat = np.bincount((drawn * size + np.arange(size)[:, None]).ravel(), minlength=units * size)
        weights = flat.reshape(units, size).astype(np.float32)
        yield weights if member is None else weights[member]


def _ratio(top: Array, bottom: Array) -> Array:
    """``top / bottom``, NaN (not a warning) where the bottom is 0."""
    out = np.full(np.broadcast_shapes(np.shape(top), np.shape(bottom)), np.nan)
    return np.divide(top, bottom, out=out, where=np.asarray(bottom) > 0)


def _mean(values: Array) -> Statistic:
    values = np.asarray(values, dtype=np.float64)
    return lambda w: _ratio(values @ w, w.sum(0, dtype=np.float64))


def _summed(rows: Array, values: Array | None, num_rows: int) -> Callable[[Array], Array]:
    """Sum of ``values`` (default 1) of the images in each row: weights (N, B) -> (rows, B)."""
    n = len(rows)
    data = np.ones(n, np.float32) if values is None else np.asarray(values, np.float32)
    matrix = sparse.csr_matrix((data, (rows, np.arange(n))), shape=(num_rows, n))
    return lambda w: np.asarray(matrix @ w)


def _f1(labels: Array, predicted: Array, num_classes: int) -> Statistic:
    hit = labels == predicted
    # a row beyond the classes collects the misses, so that the sparse matrix keeps one entry per image
    true_positive = _summed(np.where(hit, labels, num_classes), None, num_classes + 1)
    support, chosen = _summed(labels, None, num_classes), _summed(predicted, None, num_classes)

    def statistic(w: Array) -> Array:
        with np.errstate(invalid="ignore"):
            per_class = _ratio(2.0 * true_positive(w)[:-1], support(w) + chosen(w))
        return _nanmean(per_class)

    return statistic


def _nanmean(values: Array) -> Array:
    """Mean over axis 0 of what is not NaN; NaN where nothing is left."""
    there = ~np.isnan(values)
    return _ratio(np.where(there, values, 0.0).sum(0), there.sum(0))


def _binary_auroc(score: Array, positive: Array) -> Statistic:
    """Weighted Mann–Whitney: the share of (positive, negative) pairs in the right order, ties count half.

    Only sums of negatives between consecutive positives are needed, one pass over the weights.
    """
    order = np.argsort(score, kind="stable")
    score, positive = score[order], positive[order]
    pos, neg = order[positive], order[~positive]
    neg_scores = score[~positive]
    below = np.searchsorted(neg_scores, score[positive], side="left")
    upto = np.searchsorted(neg_scores, score[positive], side="right")
    edges, place = np.unique(np.concatenate([below, upto]), return_inverse=True)
    # interval of edges each negative (in rising order) belongs to: summed, then accumulated over the edges
    slot = np.searchsorted(edges, np.arange(len(neg)), side="right")
    sums = sparse.csr_matrix((np.ones(len(neg), np.float32), (slot, neg)), shape=(len(edges) + 1, len(positive)))
    at_below, at_upto = place[: len(pos)], place[len(pos) :]
    # Σ over positives of w·(below + upto)/2, as one product: (edges × positives)
    half = np.full(len(pos), 0.5, np.float32)
    gather = sparse.csr_matrix(
        (np.concatenate([half, half]), (np.concatenate([at_below, at_upto]), np.concatenate([pos, pos]))),
        shape=(len(edges), len(positive)),
    )

    def statistic(w: Array) -> Array:
        accumulated = np.cumsum(np.asarray(sums @ w, np.float64), axis=0)[:-1]
        wins = (accumulated * np.asarray(gather @ w)).sum(0)
        pairs = w[pos].sum(0, dtype=np.float64) * w[neg].sum(0, dtype=np.float64)
        return _ratio(wins, pairs)

    return statistic


def _auroc(scores: Array, targets: Array) -> Statistic:
    """Mean one-versus-rest AUROC over the columns of ``targets`` (N, K) that have positives and negatives."""
    columns = [k for k in range(targets.shape[1]) if 0 < targets[:, k].sum() < len(targets)]
    each = [_binary_auroc(scores[:, k], targets[:, k].astype(bool)) for k in columns]

    def statistic(w: Array) -> Array:
        if not each:
            return np.full(w.shape[1], np.nan)
        return _nanmean(np.stack([one(w) for one in each]))

    return statistic


def _bin_of(confidence: Array, bins: int) -> Array:
    edges = np.linspace(0.0, 1.0, bins + 1)
    # a confidence of exactly 1 belongs to the last bin, not to one of its own
    return np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)


def _ece(confidence: Array, correct: Array, bins: int = 15) -> Statistic:
    gap = _summed(_bin_of(confidence, bins), confidence - correct, bins)
    return lambda w: _ratio(np.abs(gap(w)).sum(0, dtype=np.float64), w.sum(0, dtype=np.float64))


def _aurc(confidence: Array, correct: Array) -> Statistic:
    order, wrong = _by_confidence(confidence, correct)

    def statistic(w: Array) -> Array:
        drawn = w[order].astype(np.float64)
        kept = np.cumsum(drawn, axis=0)
        risk = _ratio(np.cumsum(drawn * wrong[:, None], axis=0), kept)
        return _ratio(np.nansum(drawn * risk, axis=0), kept[-1])

    return statistic


def _by_confidence(confidence: Array, correct: Array) -> tuple[Array, Array]:
    """Order from most to least confident, and the error of each in it; equals share their mean error."""
    order = np.argsort(-confidence, kind="stable")
    _, group = np.unique(confidence[order], return_inverse=True)
    wrong = 1.0 - correct[order].astype(np.float64)
    return order, (np.bincount(group, wrong) / np.bincount(group))[group]


def _r2(target: Array, predicted: Array) -> Statistic:
    """1 − Σe²/Σ(y − ȳ)² per target, averaged over targets; NaN where a target does not vary."""
    error = np.square(target - predicted).T
    # a large offset would cancel in Σy² − (Σy)²/n
    y = (target - target.mean(0)).T
    # below this, what is left of the variance is rounding
    least = 1e-9 * np.square(y).sum(1, keepdims=True) / len(target)

    def statistic(w: Array) -> Array:
        total = w.sum(0, dtype=np.float64)
        spread = np.square(y) @ w - _ratio(np.square(y @ w), total)
        per_target = 1.0 - _ratio(error @ w, np.where(spread > least * total, spread, 0.0))
        return np.asarray(per_target.mean(0))

    return statistic


def _point_and_resamples(
    measures: Mapping[str, Sequence[Statistic]],
    num_images: int,
    resamples: Mapping[str, int],
    seed: int,
    groups: ArrayLike | None,
) -> dict[str, tuple[Array, Array]]:
    """Value per seed (S,) and resampled values per seed (S, B) of every measure; one draw serves all."""
    ones = np.ones((num_images, 1), np.float32)
    points = {m: np.array([s(ones)[0] for s in seeds]) for m, seeds in measures.items()}
    found: dict[str, list[Array]] = {m: [] for m in measures}
    done = 0
    for weights in resample_weights(num_images, max(resamples.values(), default=0), seed=seed, groups=groups):
        for m, seeds in measures.items():
            if done < resamples[m]:
                found[m].append(np.stack([s(weights) for s in seeds]))
        done += weights.shape[1]
    empty = np.empty((1, 0))
    return {m: (points[m], np.concatenate(found[m], axis=1) if found[m] else empty) for m in measures}


def _resampled(point: Array, replicates: Array, seed: int) -> Array:
    """Distribution (B,) of the mean over seeds, centred on the estimate: drawn images plus drawn seeds."""
    total = replicates.mean(0)
    num_seeds = len(point)
    if num_seeds > 1:
        rng = np.random.default_rng([seed, 1])
        drawn = rng.integers(0, num_seeds, (len(total), num_seeds - 1))
        total = total + point[drawn].mean(1) - point.mean()
    there = total[~np.isnan(total)]
    return there - there.mean() + point.mean() if len(there) else there


def _interval(
    point: Array,
    replicates: Array,
    *,
    level: float,
    seed: int,
    floor: float = -np.inf,
    ceiling: float = np.inf,
    note: str | None = None,
) -> Interval:
    value = float(point.mean())
    per_seed: list[float | None] | None = [float(p) for p in point] if len(point) > 1 else None
    if not np.isfinite(value):
        return Interval(per_seed=per_seed, note=note or "not defined on these test images")
    if replicates.shape[1] == 0:
        return Interval(value=value, per_seed=per_seed, note=note)
    total = _resampled(point, replicates, seed)
    notes = [note] if note else []
    if len(total) < 0.95 * replicates.shape[1] or not len(total):
        return Interval(value=value, per_seed=per_seed, note="; ".join([*notes, "too few images for an interval"]))
    low, high = np.quantile(total, [(1 - level) / 2, (1 + level) / 2])
    if high - low <= 1e-12 * max(1.0, abs(value)):
        return Interval(
            value=value, per_seed=per_seed, note="; ".join([*notes, "no spread to resample, so no interval"])
        )
    return Interval(
        value=value,
        low=min(value, max(float(low), floor)),
        high=max(value, min(float(high), ceiling)),
        per_seed=per_seed,
        note="; ".join(notes) or None,
    )


def _exact_bound(interval: Interval, num_images: int, level: float) -> Interval:
    """All right or all wrong: resampling sees no spread, the exact binomial (Clopper–Pearson) bound does."""
    if interval.low is not None or interval.value not in (0.0, 1.0):
        return interval
    tail = ((1 - level) / 2) ** (1 / num_images)
    low, high = (tail, 1.0) if interval.value == 1.0 else (0.0, 1 - tail)
    which = "right" if interval.value == 1.0 else "wrong"
    note = f"all {num_images} images {which}; exact binomial bound"
    return Interval(value=interval.value, low=low, high=high, per_seed=interval.per_seed, note=note)


def bootstrap_ci(
    values: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> Interval:
    """Mean of a value that every test image has, with its interval over images and seeds.

    For robust accuracy, faithfulness per image, absolute error and the like.

    Args:
        values: (N,) or (S, N); booleans count as 0 and 1 and get an exact bound if all are equal.
        resamples: bootstrap samples.
        level: of confidence.
        seed: of the generator.
        groups: (N,) group of each image; groups are drawn whole.

    >>> bootstrap_ci([1, 0, 1, 1, 1, 0, 1, 1, 1, 1]).value
    0.8
    """
    given = np.atleast_2d(np.asarray(values))
    table = given.astype(np.float64)
    if table.ndim != 2:
        raise BadInput(f"values must be (N,) or (S, N); got shape {np.shape(values)}.")
    num_images = table.shape[1]
    if num_images == 0:
        return Interval(note="no images")
    if not np.isfinite(table).all():
        raise BadInput(f"{int((~np.isfinite(table)).sum())} of {table.size} values are NaN or infinite.")
    out = _point_and_resamples({"mean": [_mean(v) for v in table]}, num_images, {"mean": resamples}, seed, groups)
    zero_one = bool(np.isin(table, (0.0, 1.0)).all())
    interval = _interval(
        *out["mean"],
        level=level,
        seed=seed,
        floor=0.0 if zero_one else -np.inf,
        ceiling=1.0 if zero_one else np.inf,
    )
    return _exact_bound(interval, num_images, level) if zero_one and given.dtype.kind in "bui" else interval


# ---- measures of a task


def pool_folds(predictions: Sequence[ArrayLike], labels: Sequence[ArrayLike]) -> tuple[Array, Array]:
    """Out-of-fold predictions of all folds as one test set, in which every image counts once.

    Args:
        predictions: per fold (N_f, …), or (S, N_f, …) where several seeds ran; told apart by the labels.
        labels: per fold (N_f, …).

    Returns: predictions (S, N, …) and labels (N, …).
    """
    if len(predictions) != len(labels):
        raise BadInput(f"{len(predictions)} folds of predictions but {len(labels)} folds of labels.")
    targets = [np.asarray(y) for y in labels]
    folds = []
    for number, (given, target) in enumerate(zip(predictions, targets), start=1):
        fold = np.asarray(given)
        by_seed = fold.ndim >= 2 and fold.shape[0] != len(target) and fold.shape[1] == len(target)
        by_seed = by_seed or (fold.ndim == 3 and fold.shape[1] == len(target))
        if not by_seed and (fold.ndim == 0 or len(fold) != len(target)):
            raise BadInput(f"fold {number} has {len(target)} labels but predictions of shape {fold.shape}.")
        folds.append(fold if by_seed else fold[None])
    if len({len(fold) for fold in folds}) > 1:
        raise BadInput(f"folds have different numbers of seeds: {[len(fold) for fold in folds]}.")
    return np.concatenate(folds, axis=1), np.concatenate(targets)


def _finite(values: Array, what: str) -> Array:
    if not np.isfinite(values).all():
        bad = ~np.isfinite(values).reshape(*values.shape[:2], -1).all(2)
        raise BadInput(
            f"{what} of {int(bad.any(0).sum())} of {values.shape[1]} test images are NaN or infinite: "
            "the model has diverged; try a lower learning rate or precision='fp32'."
        )
    return values


def _probabilities(probs: ArrayLike | Sequence[ArrayLike], sum_to_one: bool = True) -> tuple[Array, float]:
    """Probabilities (S, N, K) in float64, and the smallest one their own precision tells from 0."""
    given = np.asarray(probs)
    eps = float(np.finfo(given.dtype).eps) if given.dtype.kind == "f" else float(np.finfo(np.float64).eps)
    p = given.astype(np.float64)
    p = p[None] if p.ndim == 2 else p
    if p.ndim != 3:
        raise BadInput(f"probabilities must be (N, K) or (S, N, K); got shape {given.shape}.")
    if p.size:
        _finite(p, "the probabilities")
        if p.min() < -1e-6 or p.max() > 1 + 1e-3 or (sum_to_one and np.abs(p.sum(2) - 1).max() > 0.02):
            raise BadInput("probabilities must lie in 0…1 and sum to 1; these look like logits: apply softmax first.")
    return p, eps


def _classes_of(labels: ArrayLike, num_images: int, num_classes: int) -> Array:
    y = np.asarray(labels)
    if y.shape != (num_images,):
        raise BadInput(f"labels must be ({num_images},), one per test image; got shape {y.shape}.")
    y = y.astype(np.int64)
    if len(y) and (y.min() < 0 or y.max() >= num_classes):
        raise BadInput(f"labels must be 0…{num_classes - 1}; got {y.min()}…{y.max()}.")
    return y


def _measure(
    statistics: Mapping[str, Sequence[Statistic]],
    num_images: int,
    *,
    resamples: int,
    level: float,
    seed: int,
    groups: ArrayLike | None,
    notes: Mapping[str, str],
    unbounded: frozenset[str] = frozenset({"nll", "mae", "rmse"}),
    auroc_work: float = 0.0,
) -> dict[str, Interval]:
    if num_images == 0:
        return {m: Interval(note="no test images") for m in statistics}
    if num_images == 1:
        resamples = 0
    times = dict.fromkeys(statistics, resamples)
    if auroc_work and "auroc" in times:
        times["auroc"] = min(resamples, max(200, int(_AUROC_WORK / auroc_work)))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = _point_and_resamples(statistics, num_images, times, seed, groups)
    out = {}
    for m, (point, replicates) in found.items():
        note = notes.get(m)
        if num_images == 1:
            note = "; ".join(filter(None, [note, "one test image, so no interval"]))
        # r² has no floor; the other unbounded ones start at 0
        floor = -np.inf if m == "r2" else 0.0
        ceiling = np.inf if m in unbounded else 1.0
        out[m] = _interval(point, replicates, level=level, seed=seed, floor=floor, ceiling=ceiling, note=note)
    return out


def measure_classify(
    probs: ArrayLike | Sequence[ArrayLike],
    labels: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> dict[str, Interval]:
    """Measures of single-label classification, with intervals over test images and seeds.

    accuracy; macro_f1 (mean F1 of the classes that occur among labels or predictions); auroc (mean
    one-versus-rest over the classes in the test set); nll (mean −log p of the true class, in nats); ece
    (15 equal-width bins); aurc (mean error over all coverages when the least confident are rejected first).

    Args:
        probs: (S, N, K), (N, K) or one (N, K) per seed; rows sum to 1. For folds see :func:`pool_folds`.
        labels: (N,) class numbers.
        resamples: bootstrap samples; AUROC of very large tables uses fewer, at least 200.
        level: of confidence.
        seed: of the resampling.
        groups: (N,) group of each image, e.g. the patient; whole groups are drawn.

    Raises:
        BadInput: probabilities that are NaN or do not sum to 1, labels out of range, shapes that disagree.
    """
    p, eps = _probabilities(probs)
    num_seeds, num_images, num_classes = p.shape
    y = _classes_of(labels, num_images, num_classes)
    predicted, confidence = p.argmax(2), p.max(2, initial=0.0)
    correct = (predicted == y).astype(np.float64)
    one_hot = y[:, None] == np.arange(num_classes)
    notes: dict[str, str] = {}
    if absent := [k for k in range(num_classes) if num_images and not one_hot[:, k].any()]:
        listed = ", ".join(map(str, absent[:10])) + (" …" if len(absent) > 10 else "")
        notes["auroc"] = f"classes not in the test set are left out: {listed}"
        if num_classes - len(absent) < 2:
            notes["auroc"] = "needs at least two classes in the test set"
    own = np.take_along_axis(p, np.broadcast_to(y[None, :, None], (num_seeds, num_images, 1)), 2)[..., 0]
    nll = -np.log(np.clip(own, eps, 1.0))
    each = range(num_seeds)
    measures: dict[str, list[Statistic]] = {
        "accuracy": [_mean(correct[s]) for s in each],
        "macro_f1": [_f1(y, predicted[s], num_classes) for s in each],
        "auroc": [_auroc(p[s], one_hot) for s in each],
        "nll": [_mean(nll[s]) for s in each],
        "ece": [_ece(confidence[s], correct[s]) for s in each],
        "aurc": [_aurc(confidence[s], correct[s]) for s in each],
    }
    out = _measure(
        measures,
        num_images,
        resamples=resamples,
        level=level,
        seed=seed,
        groups=groups,
        notes=notes,
        auroc_work=float(p.size),
    )
    if num_images > 1:
        out["accuracy"] = _exact_bound(out["accuracy"], num_images, level)
    return out


def measure_multilabel(
    probs: ArrayLike | Sequence[ArrayLike],
    labels: ArrayLike,
    *,
    threshold: float = 0.5,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> dict[str, Interval]:
    """Measures of multi-label classification, with intervals over test images and seeds.

    accuracy (every label of the image right), label_accuracy (share of right yes/no answers), macro_f1, auroc
    (means over labels), nll (binary cross-entropy per label, in nats), ece (of the yes/no answers, 15 bins).

    Args:
        probs: (S, N, K) or (N, K), each label's probability.
        labels: (N, K) of 0 and 1.
        threshold: probability from which a label counts as predicted.
        resamples, level, seed, groups: as in :func:`measure_classify`.
    """
    p, eps = _probabilities(probs, sum_to_one=False)
    num_seeds, num_images, num_labels = p.shape
    y = np.asarray(labels)
    if y.shape != (num_images, num_labels):
        raise BadInput(f"labels must be ({num_images}, {num_labels}); got shape {y.shape}.")
    truth = y.astype(bool)
    predicted = p >= threshold
    right = (predicted == truth).astype(np.float64)
    answer = np.where(predicted, p, 1 - p)
    entropy = -np.where(truth, np.log(np.clip(p, eps, 1.0)), np.log(np.clip(1 - p, eps, 1.0)))
    each = range(num_seeds)
    measures: dict[str, list[Statistic]] = {
        "accuracy": [_mean(right[s].all(1)) for s in each],
        "label_accuracy": [_mean(right[s].mean(1)) for s in each],
        "macro_f1": [_multilabel_f1(truth, predicted[s]) for s in each],
        "auroc": [_auroc(p[s], truth) for s in each],
        "nll": [_mean(entropy[s].mean(1)) for s in each],
        "ece": [_multilabel_ece(answer[s], right[s]) for s in each],
    }
    notes = {}
    if num_images and (constant := int((truth.all(0) | ~truth.any(0)).sum())):
        notes["auroc"] = f"{constant} of {num_labels} labels do not vary in the test set and are left out"
    out = _measure(
        measures,
        num_images,
        resamples=resamples,
        level=level,
        seed=seed,
        groups=groups,
        notes=notes,
        auroc_work=float(p.size),
    )
    if num_images > 1:
        out["accuracy"] = _exact_bound(out["accuracy"], num_images, level)
    return out


def _multilabel_f1(truth: Array, predicted: Array) -> Statistic:
    both = (truth & predicted).T.astype(np.float64)
    either = (truth.astype(np.float64) + predicted).T
    return lambda w: _nanmean(_ratio(2.0 * (both @ w), either @ w))


def _multilabel_ece(answer: Array, right: Array, bins: int = 15) -> Statistic:
    num_images, num_labels = answer.shape
    image = np.repeat(np.arange(num_images), num_labels)
    gap = sparse.csr_matrix(
        ((answer - right).ravel().astype(np.float32), (_bin_of(answer, bins).ravel(), image)),
        shape=(bins, num_images),
    )
    return lambda w: _ratio(np.abs(gap @ w).sum(0), num_labels * w.sum(0, dtype=np.float64))


def measure_regress(
    predictions: ArrayLike | Sequence[ArrayLike],
    targets: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> dict[str, Interval]:
    """mae, rmse and r2 with intervals over test images and seeds; several targets are averaged.

    Args:
        predictions: (S, N) or (N,) for targets (N,); (S, N, D) or (N, D) for targets (N, D).
        targets: (N,) or (N, D).
        resamples, level, seed, groups: as in :func:`measure_classify`.
    """
    t = np.asarray(targets, dtype=np.float64)
    p = np.asarray(predictions, dtype=np.float64)
    p = p[None] if p.ndim == t.ndim else p
    if p.shape[1:] != t.shape or t.ndim not in (1, 2):
        raise BadInput(f"predictions of shape {p.shape} do not belong to targets of shape {t.shape}.")
    t, p = t.reshape(len(t), -1), p.reshape(*p.shape[:2], -1)
    if p.size:
        _finite(p, "the predictions")
    notes = {}
    if len(t) and bool((np.ptp(t, axis=0) == 0).any()):
        notes["r2"] = "the targets do not vary in the test set" if len(t) > 1 else "needs two test images"

    def rmse(error: Array) -> Statistic:
        squared = np.square(error).T
        return lambda w: np.sqrt(_ratio(squared @ w, w.sum(0, dtype=np.float64))).mean(0)

    each = range(len(p))
    measures: dict[str, list[Statistic]] = {
        "mae": [_mean(np.abs(p[s] - t).mean(1)) for s in each],
        "rmse": [rmse(p[s] - t) for s in each],
        "r2": [_r2(t, p[s]) for s in each],
    }
    return _measure(measures, len(t), resamples=resamples, level=level, seed=seed, groups=groups, notes=notes)


# ---- what the charts show


def reliability(probs: ArrayLike, labels: ArrayLike, bins: int = 15) -> list[ReliabilityBin]:
    """Mean confidence and accuracy in equal-width bins; seeds are pooled, empty bins left out.

    Args:
        probs: (S, N, K) or (N, K).
        labels: (N,).
        bins: number of bins over 0…1.
    """
    p, _ = _probabilities(probs)
    y = _classes_of(labels, *p.shape[1:])
    confidence = p.max(2, initial=0.0).ravel()
    correct = (p.argmax(2) == y).ravel()
    where = _bin_of(confidence, bins)
    count = np.bincount(where, minlength=bins)
    sums = np.bincount(where, confidence, bins), np.bincount(where, correct, bins)
    return [
        ReliabilityBin(confidence=sums[0][b] / count[b], accuracy=sums[1][b] / count[b], count=count[b])
        for b in range(bins)
        if count[b]
    ]


def confusion(probs: ArrayLike, labels: ArrayLike) -> list[list[int]]:
    """Confusion matrix: rows the true class, columns the predicted one; seeds are added up."""
    p, _ = _probabilities(probs)
    num_classes = p.shape[2]
    y = _classes_of(labels, p.shape[1], num_classes)
    flat = np.bincount((y * num_classes + p.argmax(2)).ravel(), minlength=num_classes**2)
    return [[int(c) for c in row] for row in flat.reshape(num_classes, num_classes)]


def rejection(confidence: ArrayLike, correct: ArrayLike, points: int = 50) -> tuple[list[RejectionPoint], float | None]:
    """Accuracy when the least confident images are left to a person, and the area under that curve.

    ``AURC = 1/N Σₙ (errors among the n most confident) / n``; equal confidences share their mean error, so
    the order of the images plays no role.

    Args:
        confidence: (S, N) or (N,), any score that rises with certainty.
        correct: (S, N) or (N,) of 0 and 1.
        points: how many points of the curve to return, at most.

    Returns: points by rising coverage (mean over seeds), and the AURC (None without images).
    """
    c, r = np.atleast_2d(np.asarray(confidence, float)), np.atleast_2d(np.asarray(correct, float))
    if c.shape != r.shape:
        raise BadInput(f"confidence has shape {c.shape} but correct has {r.shape}.")
    n = c.shape[1]
    if n == 0:
        return [], None
    risk = np.mean([np.cumsum(_by_confidence(a, b)[1]) / np.arange(1, n + 1) for a, b in zip(c, r)], axis=0)
    kept = np.unique(np.linspace(1, n, min(points, n)).round().astype(int))
    curve = [RejectionPoint(coverage=k / n, selective_accuracy=1 - risk[k - 1]) for k in kept]
    return curve, float(risk.mean())


# ---- comparing recipes


def mcnemar(a: ArrayLike, b: ArrayLike) -> float:
    """Exact two-sided McNemar test: do two models err on different images equally often?

    ``n₁₀`` images only ``a`` gets right, ``n₀₁`` only ``b``; if they are equally good,
    ``n₁₀ ~ Binomial(n₁₀ + n₀₁, ½)``.

    Args:
        a, b: (N,) booleans, right or wrong on the same images.

    >>> round(mcnemar([1] * 9 + [0], [0] * 9 + [1]), 6)
    0.021484
    """
    x, y = np.asarray(a, bool), np.asarray(b, bool)
    only_a, only_b = int((x & ~y).sum()), int((~x & y).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def compare(
    recipe: ArrayLike,
    baseline: ArrayLike,
    *,
    measure: str = "accuracy",
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> Comparison:
    """Paired comparison of a recipe with the baseline on the same test images.

    Right-or-wrong answers of one seed (or pooled folds) without groups: exact McNemar test. Otherwise: paired
    bootstrap over images and seeds, ``p`` the share of resampled deviations at least as large as the observed
    difference. The interval of the difference is from the paired bootstrap in both cases.

    Args:
        recipe: (N,) or (S, N) score per image, averaged by the measure: right/wrong, absolute error …
        baseline: same shape, same images in the same order.
        measure: what the difference is in; stored with the result.
        resamples, level, seed, groups: as in :func:`bootstrap_ci`.

    Raises:
        BadInput: shapes differ or scores are not finite.
    """
    a, b = (np.atleast_2d(np.asarray(x, float)) for x in (recipe, baseline))
    if a.shape != b.shape:
        raise BadInput(f"the recipe has scores of shape {a.shape}, the baseline {b.shape}; they must be paired.")
    num_seeds, num_images = a.shape
    if num_images == 0:
        return Comparison(measure=measure, test="paired bootstrap", note="no test images")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise BadInput("scores to compare must be finite.")
    d = a - b
    binary = bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    exact = binary and num_seeds == 1 and groups is None
    test: Any = "mcnemar" if exact else "paired bootstrap"
    difference = float(d.mean())
    if not d.any():
        note = f"the same score on all {num_images} test images"
        return Comparison(measure=measure, difference=0.0, p=1.0, test=test, note=note)
    out = _point_and_resamples(
        {"difference": [_mean(row) for row in d]}, num_images, {"difference": resamples}, seed, groups
    )
    interval = _interval(*out["difference"], level=level, seed=seed)
    if exact:
        p = mcnemar(a[0], b[0])
    else:
        deviation = np.abs(_resampled(*out["difference"], seed) - difference)
        # + 1: the observed difference is one of the possible draws, so p is never 0
        p = float((1 + (deviation >= abs(difference) - 1e-12).sum()) / (1 + len(deviation)))
        if interval.low is None:  # one image, or one value everywhere: resampling says nothing
            p = 1.0
    return Comparison(
        measure=measure,
        difference=difference,
        low=interval.low,
        high=interval.high,
        p=p,
        test=test,
        note=interval.note,
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: ``p₍ᵢ₎ → max_{j≤i} min(1, (m − j + 1) p₍ⱼ₎)``; None stays None.

    >>> holm([0.01, 0.04, 0.03, 0.005])
    [0.03, 0.06, 0.06, 0.02]
    """
    given = [i for i, p in enumerate(p_values) if p is not None]
    order = sorted(given, key=lambda i: p_values[i] or 0.0)
    out: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(given) - rank) * float(p_values[i] or 0.0)))
        out[i] = largest
    return out


def correct_family(comparisons: Mapping[str, Comparison | None], level: float = LEVEL) -> dict[str, Comparison | None]:
    """The comparisons of all recipes with ``p_holm`` and ``significant`` filled in, over the whole family."""
    names = list(comparisons)
    corrected = holm([c.p if (c := comparisons[n]) else None for n in names])
    out: dict[str, Comparison | None] = {}
    for n, p in zip(names, corrected):
        c = comparisons[n]
        update = {"p_holm": p, "significant": p is not None and p < 1 - level}
        out[n] = c.model_copy(update=update) if c else None
    return out


def pareto_front(points: ArrayLike, minimise: Sequence[bool]) -> list[bool]:
    """Which points no other point beats: at least as good in everything and better in something.

    Args:
        points: (n, d); a point with a missing value (None, NaN) is never on the front.
        minimise: per column, whether less is better.

    >>> pareto_front([[0.9, 10], [0.8, 20], [0.7, 5]], minimise=[False, True])
    [True, False, True]
    """
    table = np.asarray(points, dtype=float).reshape(-1, len(minimise))
    there = ~np.isnan(table).any(1)
    cost = np.where(np.asarray(minimise), table, -table)
    front = []
    for i in range(len(cost)):
        others = cost[there]
        beaten = (others <= cost[i]).all(1) & (others < cost[i]).any(1)
        front.append(bool(there[i] and not beaten.any()))
    return front
