from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitkit.errors import BadInput
from vitkit.stress.ood.softmax_rejection import (
    clopper_pearson_upper,
    risk_coverage,
    selective_report,
    softmax_rejection,
)


def draw(n=300, num_classes=4, seed=0, sharp=3.0):
    """Labels, and softmax vectors that are right most of the time."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(num_classes, (n,), generator=g)
    z = torch.randn(n, num_classes, generator=g, dtype=torch.float64)
    z[torch.arange(n), y] += sharp * torch.rand(n, generator=g, dtype=torch.float64)
    return z.softmax(1), y


centroids = st.sampled_from(["mean", "kmeans"])


@given(seed=st.integers(0, 999), num_classes=st.integers(2, 6), n=st.integers(1, 80), centroid=centroids)
def test_no_accepted_error_on_the_data_it_was_fitted_on(seed, num_classes, n, centroid):
    p, y = draw(n, num_classes, seed)
    labels, known, distance = softmax_rejection(p, y, centroid=centroid).predict(p)
    assert torch.equal(labels, p.argmax(1))
    assert not (known & (labels != y)).any()
    assert (distance >= 0).all() and (distance <= math.sqrt(2)).all()


@given(seed=st.integers(0, 99), quantile=st.floats(0, 1))
def test_a_quantile_passes_at_most_its_share_of_errors(seed, quantile):
    p, y = draw(seed=seed)
    fitted = softmax_rejection(p, y, quantile=quantile)
    labels, known, _ = fitted.predict(p)
    for k in range(4):
        wrong = (labels == k) & (labels != y)
        assert (known & wrong).sum() <= quantile * wrong.sum() + 1e-9
    stricter = softmax_rejection(p, y, quantile=quantile / 2)
    assert (stricter.thresholds <= fitted.thresholds).all()
    assert (~stricter.predict(p)[1] | known).all()


@given(seed=st.integers(0, 99), centroid=centroids, order=st.permutations(range(4)))
def test_relabelling_the_classes_changes_nothing(seed, centroid, order):
    p, y = draw(seed=seed)
    new = torch.tensor(order)
    renamed = torch.empty_like(p)
    renamed[:, new] = p
    labels, known, distance = softmax_rejection(p, y, centroid=centroid).predict(p)
    labels2, known2, distance2 = softmax_rejection(renamed, new[y], centroid=centroid).predict(renamed)
    assert torch.equal(new[labels], labels2) and torch.equal(known, known2)
    torch.testing.assert_close(distance, distance2)


@given(centroid=centroids)
def test_perfect_one_hot_answers_have_distance_zero_and_are_given(centroid):
    y = torch.tensor([0, 1, 2, 2, 1, 0])
    p = torch.eye(3)[y]
    fitted = softmax_rejection(p, y, centroid=centroid)
    _, known, distance = fitted.predict(p)
    assert not distance.any() and known.all()
    assert set(fitted.reasons) == {"no errors"}


@given(seed=st.integers(0, 999))
def test_two_classes_measure_the_difference_of_one_probability(seed):
    p, y = draw(60, 2, seed)
    fitted = softmax_rejection(p, y)
    labels, _, distance = fitted.predict(p)
    top = p.gather(1, labels[:, None])[:, 0]
    centre = fitted.centroids[labels, labels]
    torch.testing.assert_close(distance, math.sqrt(2) * (top - centre).abs())


def test_matches_the_definition_one_class_at_a_time():
    p, y = (t.numpy() for t in draw(seed=5))
    fitted = softmax_rejection(p, y)
    predicted = p.argmax(1)
    for k in range(4):
        centre = p[(predicted == k) & (y == k)].mean(0)
        np.testing.assert_allclose(fitted.centroids[k], centre)
        wrong = np.linalg.norm(p[(predicted == k) & (y != k)] - centre, axis=1)
        np.testing.assert_allclose(fitted.thresholds[k], wrong.min())
    labels, known, distance = fitted.predict(p)
    assert all(isinstance(a, np.ndarray) for a in (labels, known, distance))
    np.testing.assert_array_equal(known, distance < fitted.thresholds.numpy()[labels])
    np.testing.assert_allclose(fitted.score(p), distance)


def test_distances_that_differ_in_the_last_bits_do_not_let_an_error_pass():
    p, y = draw(500, 5, seed=1)
    fitted = softmax_rejection(p, y)
    # float32 rows move by more than the last bits, but alone or together they agree
    for rows in (p[:1], p[3:7], p.flip(0), p.float().double()):
        labels, known, _ = fitted.predict(rows)
        alone = [fitted.predict(r[None])[1][0] for r in rows]
        assert torch.equal(known, torch.stack(alone))
    labels, known, _ = fitted.predict(p)
    one_by_one = torch.stack([fitted.predict(r[None])[1][0] for r in p])
    assert not (one_by_one & (labels != y)).any()


def test_classes_without_correct_answers_or_without_errors_are_flagged():
    p = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.6, 0.3]])
    fitted = softmax_rejection(p, torch.tensor([0, 0, 1, 0]))
    assert fitted.reasons == ("no errors", "errors", "no correct answers")
    assert fitted.centroids[2].tolist() == [0, 0, 1] and fitted.thresholds[2] == 0
    # the vertex itself is not accepted either
    assert fitted.predict(torch.tensor([[0.0, 0.0, 1.0]]))[1].tolist() == [False]
    # without errors the farthest correct answer is the last that is given
    assert fitted.predict(p[:2])[1].tolist() == [True, True]
    assert fitted.predict(torch.tensor([[0.5, 0.4, 0.1]]))[1].tolist() == [False]


def test_kmeans_starts_at_the_vertices_and_keeps_their_order():
    from sklearn.cluster import KMeans

    p, y = draw(400, 4, seed=3, sharp=6.0)
    found = softmax_rejection(p, y, centroid="kmeans").centroids
    reference = KMeans(4, init=np.eye(4), n_init=1, tol=0, max_iter=300).fit(p.numpy()).cluster_centers_
    np.testing.assert_allclose(found, reference, atol=1e-8)
    assert found.argmax(1).tolist() == [0, 1, 2, 3]


def test_clopper_pearson_is_the_binomial_tail():
    from scipy.stats import binom, binomtest

    for errors, n in ((0, 30), (3, 100), (9, 10)):
        bound = clopper_pearson_upper(errors, n, 0.05)
        assert binom.cdf(errors, n, bound) == pytest.approx(0.05)
        assert bound == pytest.approx(binomtest(errors, n, alternative="less").proportion_ci(0.95, "exact").high)
    assert clopper_pearson_upper(0, 0, 0.05) == clopper_pearson_upper(5, 5, 0.05) == 1


def test_a_demanded_risk_is_kept_on_new_data():
    """Over many draws the true risk among accepted answers exceeds the bound in at most 1 − confidence of them."""
    p_test, y_test = draw(20_000, 4, seed=99_999, sharp=8.0)
    wrong = p_test.argmax(1) != y_test
    assert wrong.double().mean() > 0.12
    kept, answered = [], []
    for seed in range(60):
        p, y = draw(1500, 4, seed, sharp=8.0)
        fitted = softmax_rejection(p, y, max_risk=0.08, confidence=0.9, seed=seed)
        known = fitted.predict(p_test)[1]
        assert fitted.risk_bound <= 0.08
        answered.append(float(known.double().mean()))
        kept.append(not known.any() or bool(wrong[known].double().mean() <= 0.08))
    assert np.mean(kept) >= 0.9
    assert np.mean(answered) > 0.1


def test_a_risk_out_of_reach_refuses_everything_and_an_easy_one_nothing():
    p, y = draw(200, 4, seed=0)
    nothing = softmax_rejection(p, y, max_risk=1e-4)
    assert not nothing.predict(p)[1].any() and set(nothing.reasons) == {"risk not reached"}
    everything = softmax_rejection(p, y, max_risk=0.9)
    assert everything.predict(p)[1].all() and set(everything.reasons) == {"all accepted"}


def test_report_counts_by_hand():
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]])
    y = np.array([0, 1, 1, 0])
    report = selective_report(p, y, np.array([True, True, True, False]))
    assert report.n == 4 and report.coverage == 0.75 and report.accuracy == 0.5
    assert report.selective_accuracy == pytest.approx(2 / 3)
    assert report.errors_caught == 0.5 and report.correct_rejected == 0
    # in order of confidence: right, wrong, right, wrong
    assert report.aurc == pytest.approx(np.mean([0, 1 / 2, 1 / 3, 2 / 4]))
    ranked = selective_report(p, y, np.array([True] * 4), doubt=np.array([0, 3, 1, 2]))
    assert ranked.aurc == pytest.approx(np.mean([0, 0, 1 / 3, 2 / 4]))
    nothing = selective_report(p, y, np.zeros(4, dtype=bool))
    assert nothing.coverage == 0 and math.isnan(nothing.selective_accuracy) and nothing.errors_caught == 1
    assert math.isnan(selective_report(p[:1], y[:1], np.array([True])).errors_caught)


@given(seed=st.integers(0, 99), levels=st.integers(1, 4))
def test_ties_count_as_the_mean_over_orders(seed, levels):
    g = torch.Generator().manual_seed(seed)
    doubt = torch.randint(levels, (12,), generator=g).double()
    wrong = torch.rand(12, generator=g) < 0.4
    expected = torch.stack(
        [risk_coverage(doubt + 1e-6 * torch.rand(12, generator=g, dtype=torch.float64), wrong)[1] for _ in range(400)]
    ).mean(0)
    torch.testing.assert_close(risk_coverage(doubt, wrong)[1], expected, rtol=0, atol=0.1)


@given(seed=st.integers(0, 99))
def test_the_order_of_the_samples_does_not_matter(seed):
    p, y = draw(seed=seed)
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))
    a, b = softmax_rejection(p, y), softmax_rejection(p[order], y[order])
    torch.testing.assert_close(a.centroids, b.centroids)
    torch.testing.assert_close(a.thresholds, b.thresholds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 1.5}, "quantile=1.5"),
        ({"centroid": "median"}, "'mean' or 'kmeans'"),
        ({"max_risk": 0.0}, "max_risk=0.0"),
        ({"max_risk": 0.1, "confidence": 1.0}, "confidence=1.0"),
        ({"max_risk": 0.1, "quantile": 0.1}, "give one"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    p, y = draw(20)
    with pytest.raises(BadInput, match=message):
        softmax_rejection(p, y, **options)


def test_data_that_does_not_fit_is_refused():
    p, y = draw(20)
    with pytest.raises(BadInput, match=r"logits\.softmax"):
        softmax_rejection(p * 3, y)
    with pytest.raises(BadInput, match="NaN"):
        softmax_rejection(p * float("nan"), y)
    with pytest.raises(BadInput, match="20 class numbers"):
        softmax_rejection(p, y[:3])
    with pytest.raises(BadInput, match="there are 4 classes"):
        softmax_rejection(p, y + 2)
    with pytest.raises(BadInput, match="there are none"):
        softmax_rejection(p[:0], y[:0])
    with pytest.raises(BadInput, match="fitted on 4"):
        softmax_rejection(p, y).predict(torch.ones(2, 3) / 3)
    with pytest.raises(BadInput, match="must match"):
        selective_report(p, y, np.array([True]))


def test_half_precision_probabilities_are_taken():
    p, y = draw(200)
    half = p.to(torch.bfloat16)
    labels, known, distance = softmax_rejection(half, y).predict(half)
    assert distance.dtype == torch.float64 and not (known & (labels != y)).any()
