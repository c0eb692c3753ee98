from __future__ import annotations

import math

import pytest

from vitkit.errors import BadInput
from vitkit.stress.record import AttackRecord, over_seeds


def record(robust=0.5, **more):
    return AttackRecord(
        attack="pgd", n=10, epsilon_255=8.0, clean_accuracy=0.9, robust_accuracy=robust, attack_success=0.4, **more
    )


def test_mean_and_interval_over_seeds():
    found = over_seeds([record(0.4), record(0.5), record(0.6)])
    mean, low, high = found["robust_accuracy"]
    # t quantile of two degrees of freedom 4.3027, standard error 0.1/√3
    assert mean == pytest.approx(0.5) and high - mean == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert low == pytest.approx(2 * mean - high) and found["clean_accuracy"] == pytest.approx((0.9, 0.9, 0.9))
    assert math.isnan(found["lpips"][0]) and "epsilon_255" not in found and "n" not in found


def test_different_threats_are_not_averaged():
    with pytest.raises(BadInput, match="differ in norm, steps"):
        over_seeds([record(), record(norm="l2", steps=3)])
    with pytest.raises(BadInput, match="at least two"):
        over_seeds([record()])


def test_impossible_records_are_refused():
    with pytest.raises(BadInput, match="exceeds clean"):
        record(0.95)
    with pytest.raises(BadInput, match="at least one image"):
        AttackRecord(attack="x", n=0, clean_accuracy=0, robust_accuracy=0, attack_success=0)
    assert list(record().row())[:3] == ["attack", "goal", "knowledge"]
