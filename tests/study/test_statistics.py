"""Measures against scikit-learn, scipy and torchmetrics, intervals against simulation, degenerate cases."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics
from torchmetrics.functional.classification import multiclass_calibration_error

from vitkit.errors import BadInput
from vitkit.study import statistics as S
from vitkit.study.results import Comparison, finite


def classifier(n: int = 300, k: int = 5, seeds: int = 1, skill: float = 1.5, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    logits = rng.normal(size=(seeds, n, k))
    logits[:, np.arange(n), labels] += skill
    probs = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    return probs, labels


def test_values_are_those_of_scikit_learn_and_torchmetrics():
    probs, labels = classifier()
    p, predicted = probs[0], probs[0].argmax(1)
    got = S.measure_classify(probs, labels, resamples=50)
    expected = {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
        "auroc": metrics.roc_auc_score(labels, p, multi_class="ovr", average="macro"),
        "nll": metrics.log_loss(labels, p),
        "ece": float(multiclass_calibration_error(torch.tensor(p), torch.tensor(labels), num_classes=5, n_bins=15)),
    }
    for name, value in expected.items():
        assert got[name].value == pytest.approx(value, abs=1e-6), name
        assert got[name].low < got[name].value < got[name].high


def test_auroc_counts_ties_half():
    probs, labels = classifier(200, 3)
    coarse = probs[0].round(1)
    coarse[:, 0] += 1 - coarse.sum(1)
    coarse = coarse.clip(0, 1)
    coarse /= coarse.sum(1, keepdims=True)
    expected = metrics.roc_auc_score(labels, coarse, multi_class="ovr", average="macro")
    assert S.measure_classify(coarse, labels, resamples=20)["auroc"].value == pytest.approx(expected, abs=1e-9)


def test_every_resample_is_the_measure_of_the_drawn_images():
    """The weighted formulas must equal scikit-learn's on the images repeated as often as they were drawn."""
    probs, labels = classifier(60, 3)
    p = probs[0]
    confidence, correct = p.max(1), (p.argmax(1) == labels).astype(float)
    weights = next(S.resample_weights(60, 16, seed=3))
    one_hot = labels[:, None] == np.arange(3)
    statistics = {
        "f1": S._f1(labels, p.argmax(1), 3)(weights),
        "auroc": S._auroc(p, one_hot)(weights),
        "ece": S._ece(confidence, correct)(weights),
        "accuracy": S._mean(correct)(weights),
    }
    for b in range(5):
        rows = np.repeat(np.arange(60), weights[:, b].astype(int))
        y, q = labels[rows], p[rows]
        assert len(rows) == 60
        assert statistics["f1"][b] == pytest.approx(metrics.f1_score(y, q.argmax(1), average="macro"))
        assert statistics["auroc"][b] == pytest.approx(metrics.roc_auc_score(y, q, multi_class="ovr"))
        assert statistics["accuracy"][b] == pytest.approx((q.argmax(1) == y).mean())
        ece = multiclass_calibration_error(torch.tensor(q), torch.tensor(y), num_classes=3, n_bins=15)
        assert statistics["ece"][b] == pytest.approx(float(ece), abs=1e-5)


def test_seeds_are_averaged_and_listed():
    probs, labels = classifier(seeds=3)
    got = S.measure_classify(list(probs), labels, resamples=100)
    singles = [S.measure_classify(p, labels, resamples=10)["macro_f1"].value for p in probs]
    assert got["macro_f1"].per_seed == pytest.approx(singles)
    assert got["macro_f1"].value == pytest.approx(np.mean(singles))


def test_regression_measures_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    target = rng.normal(1000.0, 2.0, (120, 2))  # a large offset: the variance must not cancel
    predicted = target + rng.normal(0, 0.7, target.shape)
    got = S.measure_regress(predicted, target, resamples=200)
    assert got["mae"].value == pytest.approx(metrics.mean_absolute_error(target, predicted))
    assert got["rmse"].value == pytest.approx(metrics.root_mean_squared_error(target, predicted))
    assert got["r2"].value == pytest.approx(metrics.r2_score(target, predicted))
    assert all(i.low < i.value < i.high for i in got.values())
    one = S.measure_regress(predicted[None, :, 0], target[:, 0], resamples=20)
    assert one["r2"].value == pytest.approx(metrics.r2_score(target[:, 0], predicted[:, 0]))


def test_multilabel_measures_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, (150, 4))
    probs = np.clip(rng.uniform(size=labels.shape) * 0.7 + 0.3 * labels, 0, 1)
    got = S.measure_multilabel(probs, labels, resamples=100)
    predicted = probs >= 0.5
    assert got["accuracy"].value == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert got["macro_f1"].value == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    assert got["auroc"].value == pytest.approx(metrics.roc_auc_score(labels, probs, average="macro"))
    assert got["label_accuracy"].value == pytest.approx((predicted == labels).mean())
    nll = np.mean([metrics.log_loss(labels[:, j], probs[:, j]) for j in range(4)])
    assert got["nll"].value == pytest.approx(nll)


# ---- intervals


def test_intervals_over_images_cover_the_truth():
    rng = np.random.default_rng(0)
    truth, inside = 0.8, 0
    for trial in range(300):
        interval = S.bootstrap_ci(rng.random(150) < truth, resamples=400, seed=trial)
        inside += interval.low <= truth <= interval.high
    assert 0.91 <= inside / 300 <= 0.98


def test_intervals_over_images_and_seeds_cover_the_truth():
    """Image difficulty, seed luck and their interaction; an interval over images alone covers far less."""
    rng = np.random.default_rng(1)
    both = images_only = 0
    widths = []
    for trial in range(250):
        image, seed = rng.normal(0, 1, (1, 120)), rng.normal(0, 0.15, (8, 1))
        values = image + seed + rng.normal(0, 1, (8, 120))
        interval = S.bootstrap_ci(values, resamples=400, seed=trial)
        both += interval.low <= 0 <= interval.high
        widths.append(interval.high - interval.low)
        narrow = S.bootstrap_ci(values.mean(0), resamples=400, seed=trial)
        images_only += narrow.low <= 0 <= narrow.high
    assert 0.90 <= both / 250 <= 0.985
    assert images_only < both
    # not wider than it must be: the true standard deviation of the mean is known here
    true_sd = np.sqrt(1 / 120 + 0.15**2 / 8 + 1 / (8 * 120))
    assert np.mean(widths) / (2 * 1.96 * true_sd) == pytest.approx(1.0, abs=0.15)


def test_groups_are_drawn_whole():
    """Ten images of one patient are one observation, not ten."""
    rng = np.random.default_rng(2)
    patient = np.repeat(np.arange(30), 10)
    values = rng.normal(size=30)[patient]
    naive, grouped = S.bootstrap_ci(values), S.bootstrap_ci(values, groups=patient)
    ratio = (grouped.high - grouped.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.2)
    probs, labels = classifier(300)
    assert S.measure_classify(probs, labels, groups=patient, resamples=200)["auroc"].low is not None


def test_same_seed_same_interval():
    probs, labels = classifier(seeds=2)
    assert S.measure_classify(probs, labels, resamples=100) == S.measure_classify(probs, labels, resamples=100)


# ---- tests between recipes


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
def test_mcnemar_is_the_binomial_test(only_a, only_b, both):
    a = np.array([1] * only_a + [0] * only_b + [1] * both)
    b = np.array([0] * only_a + [1] * only_b + [1] * both)
    n = only_a + only_b
    expected = stats.binomtest(only_a, n).pvalue if n else 1.0
    assert S.mcnemar(a, b) == pytest.approx(expected)


def test_one_seed_uses_mcnemar_and_several_the_paired_bootstrap():
    probs, labels = classifier(seeds=2)
    right = probs.argmax(2) == labels
    single = S.compare(right[0], right[1])
    assert single.test == "mcnemar"
    assert single.p == S.mcnemar(right[0], right[1])
    assert S.compare(right, right[::-1]).test == "paired bootstrap"
    assert S.compare(right[0], right[1], groups=np.arange(300) // 3).test == "paired bootstrap"


def test_paired_bootstrap_agrees_with_the_t_test():
    rng = np.random.default_rng(3)
    for shift in (0.0, 0.1, 0.2):
        b = rng.normal(size=400)
        a = b + rng.normal(shift, 1, 400)
        found = S.compare(a, b, measure="mae", resamples=4000)
        assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.03)
        assert (found.low <= 0 <= found.high) == (found.p > 0.05) or 0.02 < found.p < 0.1


def test_paired_bootstrap_keeps_its_level_under_the_null():
    rng = np.random.default_rng(4)
    ps = [S.compare(rng.normal(size=(4, 80)), rng.normal(size=(4, 80)), resamples=300, seed=t).p for t in range(200)]
    assert np.mean(np.array(ps) < 0.05) < 0.12


def test_equal_recipes_are_not_different():
    right = np.array([True, False, True, True])
    same = S.compare(right, right)
    assert (same.difference, same.p, same.significant) == (0.0, 1.0, False)
    assert "same score" in same.note


def test_comparing_unpaired_scores_is_an_error():
    with pytest.raises(BadInput, match="paired"):
        S.compare(np.ones(4), np.ones(5))


def test_holm_equals_the_hand_example():
    assert S.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert S.holm([None, 0.04]) == [None, 0.04]
    assert S.holm([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_never_smaller_and_at_most_bonferroni(p_values):
    corrected = S.holm(p_values)
    for p, c in zip(p_values, corrected):
        assert p <= c <= min(1.0, len(p_values) * p) + 1e-12
    in_order = [c for _, c in sorted(zip(p_values, corrected))]
    assert in_order == sorted(in_order)


def test_a_family_is_corrected_together():
    family = {
        "a": Comparison(difference=0.1, p=0.02, test="mcnemar"),
        "b": Comparison(difference=0.1, p=0.04, test="mcnemar"),
        "failed": None,
    }
    done = S.correct_family(family)
    assert done["a"].p_holm == pytest.approx(0.04) and done["a"].significant
    assert done["b"].p_holm == pytest.approx(0.04) and done["b"].significant
    assert done["failed"] is None
    assert family["a"].p_holm is None


# ---- curves


def test_reliability_bins_add_up_to_the_calibration_error():
    probs, labels = classifier(seeds=1)
    bins = S.reliability(probs, labels)
    total = sum(b.count for b in bins)
    ece = sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / total
    assert total == 300
    assert ece == pytest.approx(S.measure_classify(probs, labels, resamples=10)["ece"].value, abs=1e-6)


def test_full_confidence_is_in_the_last_bin():
    bins = S.reliability(np.array([[1.0, 0.0], [0.97, 0.03]]), np.array([0, 1]))
    assert [b.count for b in bins] == [2]


def test_confusion_is_that_of_scikit_learn():
    probs, labels = classifier()
    expected = metrics.confusion_matrix(labels, probs[0].argmax(1))
    assert S.confusion(probs, labels) == expected.tolist()


def test_rejection_by_hand():
    confidence = [0.9, 0.8, 0.7, 0.6]
    curve, aurc = S.rejection(confidence, [1, 1, 0, 1])
    assert [p.coverage for p in curve] == [0.25, 0.5, 0.75, 1.0]
    assert [p.selective_accuracy for p in curve] == pytest.approx([1, 1, 2 / 3, 3 / 4])
    assert aurc == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)


def test_rejection_does_not_depend_on_the_order_of_equal_confidences():
    correct = np.array([1, 0, 0, 1, 1, 0])
    _, forward = S.rejection(np.full(6, 0.5), correct)
    _, backward = S.rejection(np.full(6, 0.5), correct[::-1])
    assert forward == pytest.approx(backward) == pytest.approx(0.5)


def test_aurc_of_the_measures_is_that_of_the_curve():
    probs, labels = classifier()
    _, area = S.rejection(probs.max(2), probs.argmax(2) == labels)
    assert S.measure_classify(probs, labels, resamples=10)["aurc"].value == pytest.approx(area)


def test_pareto_front():
    points = [[0.9, 10], [0.9, 10], [0.8, 5], [0.85, 12], [None, 1], [0.8, 6]]
    assert S.pareto_front(points, [False, True]) == [True, True, True, False, False, False]
    assert S.pareto_front([], [True]) == []


# ---- folds


def test_folds_are_pooled_so_that_every_image_counts_once():
    probs, labels = classifier(300, seeds=2)
    cuts = [slice(0, 100), slice(100, 180), slice(180, 300)]
    pooled, targets = S.pool_folds([probs[:, c] for c in cuts], [labels[c] for c in cuts])
    np.testing.assert_array_equal(pooled, probs)
    np.testing.assert_array_equal(targets, labels)
    single, _ = S.pool_folds([probs[0, c] for c in cuts], [labels[c] for c in cuts])
    assert single.shape == (1, 300, 5)
    with pytest.raises(BadInput, match="fold 2 has 80 labels"):
        S.pool_folds([probs[0, :100], probs[0, :50]], [labels[:100], labels[100:180]])


# ---- degenerate cases


def is_json(measures) -> bool:
    text = json.dumps(finite({k: v.model_dump() for k, v in measures.items()}), allow_nan=False)
    return "NaN" not in text


def test_a_class_missing_in_the_test_set_is_said():
    probs, labels = classifier(200, 4)
    keep = labels != 2
    got = S.measure_classify(probs[:, keep], labels[keep], resamples=50)
    one_hot = labels[keep][:, None] == np.arange(4)
    each = [metrics.roc_auc_score(one_hot[:, k], probs[0, keep, k]) for k in (0, 1, 3)]
    assert got["auroc"].value == pytest.approx(np.mean(each))
    assert "left out: 2" in got["auroc"].note
    assert is_json(got)


def test_one_class_only_has_no_auroc():
    got = S.measure_classify([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], [0, 0, 0], resamples=50)
    assert got["auroc"].value is None
    assert "at least two classes" in got["auroc"].note
    assert got["accuracy"].value == pytest.approx(2 / 3)
    assert is_json(got)


def test_one_image_has_values_but_no_intervals():
    got = S.measure_classify([[0.8, 0.2]], [0])
    assert got["accuracy"].value == 1.0
    assert got["nll"].value == pytest.approx(-np.log(0.8))
    for interval in got.values():
        assert interval.low is None and interval.high is None
        assert interval.note
    assert is_json(got)
    assert S.measure_regress([1.0], [2.0])["r2"].value is None


def test_no_images_has_no_values():
    got = S.measure_classify(np.empty((0, 3)), np.empty(0, int))
    assert {i.value for i in got.values()} == {None}
    assert got["accuracy"].note == "no test images"


@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_all_wrong_gets_the_exact_binomial_bound(right):
    probs = np.tile([0.9, 0.1], (40, 1))
    labels = np.full(40, 0 if right else 1)
    got = S.measure_classify(probs, labels, resamples=50)["accuracy"]
    reference = stats.binomtest(40 if right else 0, 40).proportion_ci(0.95, "exact")
    assert got.low == pytest.approx(reference.low) and got.high == pytest.approx(reference.high)
    assert "exact binomial" in got.note


def test_constant_targets_have_no_r2():
    got = S.measure_regress([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], resamples=50)
    assert got["r2"].value is None and "do not vary" in got["r2"].note
    assert got["mae"].value == pytest.approx(2 / 3)
    assert is_json(got)


def test_a_certain_and_wrong_answer_has_a_finite_nll():
    got = S.measure_classify(np.array([[1, 0], [0.5, 0.5]], np.float32), [1, 0], resamples=20)
    assert np.isfinite(got["nll"].value)


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        ([[np.nan, 0.5], [0.5, 0.5]], [0, 1], "1 of 2 test images are NaN"),
        ([[3.0, -2.0], [0.5, 0.5]], [0, 1], "softmax"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 2], "labels must be 0…1"),
        ([[0.5, 0.5], [0.5, 0.5]], [0], "one per test image"),
    ],
)
def test_what_cannot_be_measured_is_an_error(probs, labels, message):
    with pytest.raises(BadInput, match=message):
        S.measure_classify(probs, labels)
