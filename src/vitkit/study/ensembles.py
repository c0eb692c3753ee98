"""Several models' predictions as one, which of them complement each other, and whether mixed families gain more.

Members are given by their probabilities on the same images, computed once each; nothing here runs a model. What is
fitted (weights, temperatures, a stacking model) is fitted on validation images and never sees the test images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitkit.errors import BadInput, unknown
from vitkit.evidence.record import paired

Array = NDArray[np.float64]

# M members · N images · K classes

#: how predictions are combined; the last five are fitted on validation images
COMBINERS = ("mean", "geometric", "vote", "accuracy", "temperature", "convex", "greedy", "stacking")
_TINY = 1e-12


@dataclass(frozen=True)
class Ensemble:
    """A fitted combination; see :func:`fit`.

    Attributes:
        method: one of :data:`COMBINERS`.
        weights: (M,), of the members; they sum to 1. Of "stacking": 1/M each, as it has none.
        temperatures: (M,); 1 where none was fitted.
        stacker: scikit-learn's model of "stacking", None otherwise.
    """

    method: str
    weights: Array
    temperatures: Array
    stacker: Any = None

    def predict(self, probs: ArrayLike) -> Array:
        """Probabilities (M, N, K) of the members → of the ensemble, (N, K).

        Votes come back as shares; a tie goes to the tied class with the larger sum of probabilities, then to the first.
        Raises: BadInput for another number of members.
        """
        members = _checked(probs)
        if len(members) != len(self.weights):
            raise BadInput(f"The ensemble was made of {len(self.weights)} members and got {len(members)}.")
        if self.stacker is not None:
            return self.stacker.predict_proba(_features(members))
        if self.method == "geometric":
            return _softmax(np.tensordot(self.weights, np.log(members), 1))
        members = _tempered(members, self.temperatures)
        if self.method == "vote":
            votes = np.eye(members.shape[2])[members.argmax(2)].mean(0)
            # smaller than the gap between two shares, so it decides ties only
            votes = votes + members.mean(0) / (2 * len(members) + 1)
            return votes / votes.sum(1, keepdims=True)
        return np.tensordot(self.weights, members, 1)


def fit(probs: ArrayLike, labels: ArrayLike, method: str = "mean", rounds: int = 50) -> Ensemble:
    """Fit a combination on validation images.

    - ``mean`` of the probabilities, ``geometric`` mean (for softmax members that is the mean of their logits), ``vote``
      of the majority: nothing is fitted.
    - ``accuracy``: a mean weighted by validation accuracy.
    - ``temperature``: a mean after each member was calibrated by one temperature.
    - ``convex``: weights on the simplex with the least NLL of the mixture, by expectation maximisation.
    - ``greedy``: Caruana's selection with replacement, by NLL; the best bag on its way.
    - ``stacking``: multinomial logistic regression on the members' log-probabilities.

    >>> probs = [[[0.9, 0.1], [0.4, 0.6]], [[0.8, 0.2], [0.6, 0.4]]]
    >>> fit(probs, [0, 1], "convex").weights.round(2).tolist()
    [1.0, 0.0]

    Args:
        probs: (M, N, K) of the members on the validation images. labels: (N,).
        method: one of :data:`COMBINERS`.
        rounds: selections of ``greedy``.

    Raises: UnknownName for another method; BadInput if shapes do not fit.
    Papers: the comparison is that of Exploring Synergistic Ensemble Learning, arXiv:2504.09076, known by its abstract;
        the set of combiners is ours. Greedy: Caruana et al., Ensemble Selection from Libraries of Models, ICML 2004.
    """
    if method not in COMBINERS:
        raise unknown("combiner", method, COMBINERS, "vitkit.study.ensembles.COMBINERS")
    members, truth = _checked(probs), np.asarray(labels)
    count = len(members)
    if truth.shape != (members.shape[1],):
        raise BadInput(f"{members.shape[1]} predictions and labels of shape {truth.shape} do not fit.")
    equal, ones = np.full(count, 1 / count), np.ones(count)
    if method == "accuracy":
        right = (members.argmax(2) == truth).mean(1)
        return Ensemble(method, right / right.sum() if right.sum() else equal, ones)
    if method == "temperature":
        return Ensemble(method, equal, np.array([_temperature(member, truth) for member in members]))
    if method == "convex":
        return Ensemble(method, _convex(_of_truth(members, truth)), ones)
    if method == "greedy":
        return Ensemble(method, _greedy(_of_truth(members, truth), rounds), ones)
    if method == "stacking":
        from sklearn.linear_model import LogisticRegression

        return Ensemble(method, equal, ones, LogisticRegression(max_iter=2000).fit(_features(members), truth))
    return Ensemble(method, equal, ones)


def complementarity(predicted: ArrayLike, labels: ArrayLike, names: Sequence[str] | None = None) -> dict[str, Any]:
    """How differently members err.

    Args:
        predicted: (M, N) classes. labels: (N,). names: of the members.

    Returns: ``names``; (M, M) lists ``disagreement`` (share of images with different answers), ``q_statistic`` (Yule's
        Q of being right, 1: always together, NaN where it is 0/0), ``double_fault`` (share both get wrong) and
        ``kappa`` (Cohen's, of being right); ``oracle``, the share at least one gets right; ``accuracy`` of each.
    Raises: BadInput if shapes do not fit.
    """
    answers, truth = np.asarray(predicted), np.asarray(labels)
    if answers.ndim != 2 or truth.shape != (answers.shape[1],) or not truth.size:
        raise BadInput(f"Answers of shape {answers.shape} and labels of shape {truth.shape} must be (M, N) and (N,).")
    right = (answers == truth).astype(np.float64)
    wrong = 1 - right
    both, neither = right @ right.T / truth.size, wrong @ wrong.T / truth.size
    first, second = right @ wrong.T / truth.size, wrong @ right.T / truth.size
    with np.errstate(invalid="ignore"):
        yule = (both * neither - first * second) / (both * neither + first * second)
        share = right.mean(1)
        chance = np.outer(share, share) + np.outer(1 - share, 1 - share)
        kappa = (both + neither - chance) / (1 - chance)
    return {
        "names": list(names) if names is not None else [str(i) for i in range(len(answers))],
        "accuracy": share.tolist(),
        "disagreement": (answers[:, None] != answers[None]).mean(2).tolist(),
        "q_statistic": yule.tolist(),
        "double_fault": neither.tolist(),
        "kappa": kappa.tolist(),
        "oracle": float(right.max(0).mean()),
    }


@dataclass(frozen=True, kw_only=True)
class Team:
    """One combination of members, scored on test images.

    Attributes:
        members: their names, sorted. mixed: whether they come from more than one family.
        right: (N,) 1 where the ensemble is right. best: name of the member with the best *validation* accuracy.
        gain: over that member on the test images: mean, low, high.
        member_accuracy: mean of the members'. cost: sum of the members' costs. slowest: the largest of them.
    """

    members: tuple[str, ...]
    mixed: bool
    right: Array
    best: str
    gain: tuple[float, float, float]
    member_accuracy: float
    cost: float
    slowest: float

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())


def teams(
    val: Mapping[str, ArrayLike],
    val_labels: ArrayLike,
    test: Mapping[str, ArrayLike],
    test_labels: ArrayLike,
    families: Mapping[str, str],
    sizes: Sequence[int] = (2, 3),
    method: str = "mean",
    costs: Mapping[str, float] | None = None,
) -> list[Team]:
    """Every combination of members of the given sizes.

    Args:
        val, test: (N, K) probabilities by member. val_labels, test_labels: (N,).
        families: "CNN", "ViT" … by member.
        sizes: members per combination. method: see :func:`fit`.
        costs: of a member, such as its latency; None: 0.

    Raises: BadInput if members differ between the tables, or there are fewer than a size asks for.
    """
    names = sorted(test)
    if set(names) != set(val) or set(names) - set(families):
        raise BadInput(
            f"val has {sorted(val)}, test {names} and families {sorted(families)}; all need the same members."
        )
    if not sizes or min(sizes) < 2 or max(sizes) > len(names):
        raise BadInput(f"sizes={tuple(sizes)} must be from 2 to the number of members, {len(names)}.")
    truth = np.asarray(test_labels)
    right = {n: (np.asarray(test[n]).argmax(1) == truth).astype(np.float64) for n in names}
    on_val = {n: float((np.asarray(val[n]).argmax(1) == np.asarray(val_labels)).mean()) for n in names}
    found = []
    for size in sizes:
        for members in combinations(names, size):
            made = fit(np.stack([val[n] for n in members]), val_labels, method)
            answer = made.predict(np.stack([test[n] for n in members])).argmax(1)
            hits = (answer == truth).astype(np.float64)
            best = max(members, key=lambda n: on_val[n])
            each = [0.0 if costs is None else float(costs[n]) for n in members]
            found.append(
                Team(
                    members=members,
                    mixed=len({families[n] for n in members}) > 1,
                    right=hits,
                    best=best,
                    gain=paired(hits, right[best]),
                    member_accuracy=float(np.mean([right[n].mean() for n in members])),
                    cost=sum(each),
                    slowest=max(each),
                )
            )
    return found


def mixed_against_same(
    found: Sequence[Team],
    match: Callable[[Team], float] = lambda team: team.member_accuracy,
    within: float = 0.01,
) -> tuple[tuple[float, float, float] | None, int]:
    """How much more mixed teams get right than like teams of equal size that match them.

    Every team of one family is set against the mixed team of its size that is nearest by ``match``, if it is near
    enough; a mixed team may serve several times. Their correctness is averaged over the pairs, image by image, so the
    interval is about other test images, not about other networks.

    Args:
        found: of :func:`teams`. match: what must be alike: mean accuracy of the members (default), or the cost.
        within: largest difference of ``match``.

    Returns: (mean, low, high) of mixed − same, None without a pair; and the number of pairs.
    """
    pairs = []
    for team in found:
        if team.mixed:
            continue
        others = [o for o in found if o.mixed and len(o.members) == len(team.members)]
        near = min(others, key=lambda o: abs(match(o) - match(team)), default=None)
        if near is not None and abs(match(near) - match(team)) <= within:
            pairs.append((near.right, team.right))
    if not pairs:
        return None, 0
    return paired(np.mean([m for m, _ in pairs], 0), np.mean([s for _, s in pairs], 0)), len(pairs)


def _checked(probs: ArrayLike) -> Array:
    members = np.asarray(probs, dtype=np.float64)
    if members.ndim != 3 or not members.size:
        raise BadInput(f"Predictions of shape {members.shape} must be (members, images, classes), none of them 0.")
    if not np.isfinite(members).all() or members.min() < 0:
        raise BadInput("Predictions must be probabilities; some are negative, NaN or infinite.")
    return np.clip(members, _TINY, None)


def _features(members: Array) -> Array:
    return np.log(members).transpose(1, 0, 2).reshape(members.shape[1], -1)


def _of_truth(members: Array, truth: NDArray[Any]) -> Array:
    """Probability that each member gives to the right class, (M, N)."""
    return members[:, np.arange(members.shape[1]), truth]


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _tempered(members: Array, temperatures: Array) -> Array:
    if (temperatures == 1).all():
        return members
    return _softmax(np.log(members) / temperatures[:, None, None])


def _temperature(member: Array, truth: NDArray[Any]) -> float:
    from scipy.optimize import minimize_scalar

    rows = np.arange(len(truth))

    def nll(log_t: float) -> float:
        return float(-np.log(np.clip(_softmax(np.log(member) / math.exp(log_t))[rows, truth], _TINY, None)).mean())

    return math.exp(minimize_scalar(nll, bounds=(-3, 3), method="bounded").x)


def _convex(given: Array, steps: int = 5000) -> Array:
    """argmin over the simplex of −mean log Σ_m w_m given_m, which is concave in w: each step gains."""
    weights = np.full(len(given), 1 / len(given))
    for _ in range(steps):
        share = weights[:, None] * given
        new = (share / share.sum(0)).mean(1)
        if np.abs(new - weights).max() < 1e-9:
            break
        weights = new
    # a corner is only reached in the limit
    best = int(np.log(given).mean(1).argmax())
    corner = np.eye(len(given))[best]
    return corner if np.log(given[best]).mean() >= np.log(weights @ given).mean() else weights


def _greedy(given: Array, rounds: int) -> Array:
    counts, best, kept = np.zeros(len(given)), -math.inf, np.zeros(len(given))
    total = np.zeros(given.shape[1])
    for n in range(1, rounds + 1):
        scores = np.log((total + given) / n).mean(1)
        choice = int(scores.argmax())
        counts[choice] += 1
        total = total + given[choice]
        # strictly better: of equal bags the smaller
        if scores[choice] > best + 1e-12:
            best, kept = float(scores[choice]), counts.copy()
    return kept / kept.sum()
