from __future__ import annotations

import numpy as np
import pytest

from vitkit.deploy.faithful import calibration_error, compare, fit_temperature, probabilities
from vitkit.errors import BadInput


def test_the_same_answers_lose_nothing():
    logits = np.random.default_rng(0).normal(size=(300, 4))
    found = compare(logits, logits.copy(), logits.argmax(1))
    assert found.drop == 0 and found.agreement == 1 and found.max_logit_diff == 0 and found.quality == 100
    # nothing was seen in 300 images: rarer than 3 in 300
    assert (found.low, found.high) == (-1.0, 1.0)
    assert found.calibration_change == 0 and found.divergence == pytest.approx(0, abs=1e-12)


def test_lost_accuracy_is_counted_in_points():
    labels = np.zeros(100, dtype=int)
    reference = np.tile([1.0, 0.0], (100, 1))
    engine = reference.copy()
    engine[:7] = [0.0, 1.0]
    found = compare(reference, engine, labels)
    assert found.drop == pytest.approx(7) and found.low < 7 < found.high and found.agreement == 0.93
    assert found.quality == pytest.approx(93)
    # an engine that is right where the model is wrong loses less than nothing
    assert compare(engine, reference, labels).drop == pytest.approx(-7)


def test_without_labels_it_is_what_the_model_expects_to_lose():
    reference = np.log(np.array([[0.6, 0.4], [0.9, 0.1]]))
    engine = np.array([[0.0, 1.0], [1.0, 0.0]])
    found = compare(reference, engine)
    assert found.drop == pytest.approx(100 * (0.6 - 0.4) / 2) and not found.labelled and found.quality is None


def test_other_tasks():
    rng = np.random.default_rng(0)
    values, noise = rng.normal(size=(200, 2)), rng.normal(size=(200, 2)) * 0.1
    worse = compare(values, values + noise, values, "regress")
    assert 0.2 < worse.drop < 3 and worse.quality == pytest.approx(100 - worse.drop)
    assert compare(values, values + noise, None, "regress").drop == pytest.approx(worse.drop)
    flags = (values > 0).astype(float)
    assert compare(values, -values, flags, "multilabel").drop == pytest.approx(100)
    assert compare(values, -values, None, "multilabel").agreement == 0


def test_bad_outputs_are_refused():
    logits = np.zeros((4, 3))
    with pytest.raises(BadInput, match="shape"):
        compare(logits, logits[:, :2])
    with pytest.raises(BadInput, match="not finite"):
        compare(logits, np.full((4, 3), np.nan))


def test_temperature_undoes_overconfidence():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6000, 5)) * 2
    labels = (probabilities(logits).cumsum(1) > rng.random((6000, 1))).argmax(1)
    too_sure = 3 * logits
    t = fit_temperature(too_sure, labels)
    assert t == pytest.approx(3, rel=0.1)
    before = calibration_error(probabilities(too_sure), labels)
    assert calibration_error(probabilities(too_sure, temperature=t), labels) < 0.3 * before
