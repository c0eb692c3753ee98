"""Copies change nothing, weights lie on the simplex, and test labels decide nothing."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from vitkit.errors import BadInput, UnknownName
from vitkit.study.ensembles import COMBINERS, complementarity, fit, mixed_against_same, teams

RNG = np.random.default_rng(0)


def _members(count=4, images=60, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    strength = np.linspace(0.5, 2.0, count)[:, None, None]
    logits = rng.normal(size=(count, images, classes)) + strength * np.eye(classes)[labels]
    return np.exp(logits) / np.exp(logits).sum(2, keepdims=True), labels


def _nll(probs, labels):
    return -np.log(probs[np.arange(len(labels)), labels]).mean()


@pytest.mark.parametrize("method", [m for m in COMBINERS if m != "stacking"])
def test_copies_of_a_member_answer_like_it(method):
    probs, labels = _members(1)
    copies = np.repeat(probs, 3, 0)
    out = fit(copies, labels, method).predict(copies)
    assert (out.argmax(1) == probs[0].argmax(1)).all()
    np.testing.assert_allclose(out.sum(1), 1)
    if method in ("mean", "geometric", "accuracy", "convex", "greedy"):
        np.testing.assert_allclose(out, probs[0], atol=1e-9)


def test_geometric_mean_is_the_mean_of_logits():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 20, 4))
    soft = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(
        fit(soft(logits), np.zeros(20, int), "geometric").predict(soft(logits)), soft(logits.mean(0))
    )


@pytest.mark.parametrize("method", ["convex", "greedy", "accuracy"])
@pytest.mark.parametrize("seed", range(4))
def test_weights_lie_on_the_simplex_and_beat_the_best_member_on_validation(method, seed):
    probs, labels = _members(seed=seed)
    made = fit(probs, labels, method)
    assert made.weights.min() >= 0 and made.weights.sum() == pytest.approx(1)
    if method != "accuracy":
        assert _nll(made.predict(probs), labels) <= min(_nll(p, labels) for p in probs) + 1e-9


def test_convex_is_the_optimum():
    probs, labels = _members(3)
    best = _nll(fit(probs, labels, "convex").predict(probs), labels)
    grid = [(a, b, 1 - a - b) for a in np.linspace(0, 1, 41) for b in np.linspace(0, 1 - a, 41)]
    assert best <= min(_nll(np.tensordot(w, probs, 1), labels) for w in grid) + 1e-9


def test_ties_are_broken_by_the_summed_probability_then_by_order():
    probs = np.array([[[0.6, 0.3, 0.1]], [[0.2, 0.7, 0.1]]])
    assert fit(probs, [0], "vote").predict(probs).argmax(1) == 1
    equal = np.array([[[0.6, 0.4]], [[0.4, 0.6]]])
    assert fit(equal, [0], "vote").predict(equal).argmax(1) == 0
    # a majority is never overruled, however sure the minority is
    sure = np.array([[[0.51, 0.49]], [[0.51, 0.49]], [[0.0, 1.0]]])
    assert fit(sure, [0], "vote").predict(sure).argmax(1) == 0


def test_temperature_calibrates_each_member():
    probs, labels = _members(2, images=400)
    sharp = probs**4 / (probs**4).sum(2, keepdims=True)
    made = fit(sharp, labels, "temperature")
    assert (made.temperatures > 2).all()
    assert _nll(made.predict(sharp), labels) < _nll(sharp.mean(0), labels)


def test_stacking_learns_to_undo_a_permutation_of_classes():
    probs, labels = _members(2, images=300)
    wrong = np.roll(probs, 1, axis=2)
    made = fit(wrong, labels, "stacking")
    assert (made.predict(wrong).argmax(1) == labels).mean() > (wrong.mean(0).argmax(1) == labels).mean() + 0.3


def test_complementarity_by_hand():
    labels = np.array([0, 0, 1, 1, 2, 2])
    answers = np.array([[0, 0, 1, 0, 2, 0], [0, 1, 1, 0, 2, 2]])
    found = complementarity(answers, labels, ["a", "b"])
    assert found["accuracy"] == pytest.approx([4 / 6, 4 / 6])
    assert found["disagreement"][0][1] == pytest.approx(2 / 6)
    assert found["double_fault"][0][1] == pytest.approx(1 / 6)
    # both right 3, neither 1, one each
    assert found["q_statistic"][0][1] == pytest.approx((3 * 1 - 1 * 1) / (3 * 1 + 1 * 1))
    right = answers == labels
    assert found["kappa"][0][1] == pytest.approx(cohen_kappa_score(right[0], right[1]))
    assert found["oracle"] == pytest.approx(5 / 6)


def test_oracle_is_at_least_every_rule_that_picks_a_members_answer():
    probs, labels = _members(5, seed=3)
    oracle = complementarity(probs.argmax(2), labels)["oracle"]
    assert oracle >= (fit(probs, labels, "vote").predict(probs).argmax(1) == labels).mean()
    assert oracle >= (probs.argmax(2) == labels).mean(1).max()


def test_teams_and_matched_comparison():
    probs, labels = _members(4, images=200)
    val, test = ({n: p[part] for n, p in zip("abcd", probs)} for part in (slice(100), slice(100, 200)))
    families = {"a": "CNN", "b": "CNN", "c": "ViT", "d": "ViT"}
    costs = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    found = teams(val, labels[:100], test, labels[100:], families, costs=costs)
    assert len(found) == 6 + 4 and sum(not t.mixed for t in found) == 2
    pair = next(t for t in found if t.members == ("a", "d"))
    assert pair.mixed and pair.cost == 5 and pair.slowest == 4
    wanted = (np.mean([test["a"], test["d"]], 0).argmax(1) == labels[100:]).mean()
    assert pair.accuracy == pytest.approx(wanted)
    result, count = mixed_against_same(found, within=1.0)
    assert count == 2 and result[1] <= result[0] <= result[2]
    assert mixed_against_same(found, within=-1.0) == (None, 0)


def test_nothing_fitted_sees_the_test_labels():
    probs, labels = _members(3, images=100)
    val, test = ({n: p[part] for n, p in zip("abc", probs)} for part in (slice(50), slice(50, 100)))
    families = dict.fromkeys("abc", "x")
    one = teams(val, labels[:50], test, labels[50:], families, method="greedy")
    other = teams(val, labels[:50], test, (labels[50:] + 1) % 5, families, method="greedy")
    assert [t.best for t in one] == [t.best for t in other]


def test_errors():
    probs, labels = _members(2)
    with pytest.raises(UnknownName):
        fit(probs, labels, "median")
    with pytest.raises(BadInput, match="labels of shape"):
        fit(probs, labels[:3])
    with pytest.raises(BadInput, match="2 members and got 1"):
        fit(probs, labels).predict(probs[:1])
    with pytest.raises(BadInput, match="negative, NaN"):
        fit(probs - 1, labels)
    with pytest.raises(BadInput, match="from 2 to"):
        teams({"a": probs[0]}, labels, {"a": probs[0]}, labels, {"a": "x"})
