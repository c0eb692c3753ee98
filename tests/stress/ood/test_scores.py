from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitkit.errors import BadInput
from vitkit.stress.ood import scores


def test_scores_by_hand():
    p = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert scores.msp(p).tolist() == pytest.approx([0.3, 0, 2 / 3])
    assert scores.margin(p).tolist() == pytest.approx([0.5, 0, 1])
    assert scores.entropy(p).tolist() == pytest.approx([0.801819, 0, math.log(3)], abs=1e-6)
    z = np.array([[1.0, 2.0], [100.0, 0.0]])
    assert scores.energy(z).tolist() == pytest.approx([-math.log(math.e + math.e**2), -100])
    assert scores.energy(z, 2.0).tolist() == pytest.approx([-2 * math.log(math.e**0.5 + math.e), -100])
    torch.testing.assert_close(scores.scaled_msp(z, 1.0), scores.msp(torch.tensor(z).softmax(1)))


@given(seed=st.integers(0, 99), k=st.integers(2, 6))
def test_all_scores_of_two_classes_order_alike(seed, k):
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = z.softmax(1)
    order = scores.msp(p).argsort()
    assert torch.equal(scores.margin(p).argsort(), order) and torch.equal(scores.entropy(p).argsort(), order)
    assert torch.equal(scores.scaled_msp(z, float(k)).argsort(), order)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_temperature_is_found_again(temperature):
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(20_000, 5, generator=g, dtype=torch.float64)
    y = torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]
    assert scores.fit_temperature(z * temperature, y) == pytest.approx(temperature, rel=0.03)


def test_detection_figures():
    rng = np.random.default_rng(0)
    unknown = np.repeat([False, True], 5000)
    s = np.concatenate([rng.normal(0, 1, 5000), rng.normal(1, 1, 5000)])
    found = scores.detection(s, unknown)
    normal = torch.distributions.Normal(0.0, 1.0)
    tail = lambda v: 1 - float(normal.cdf(torch.tensor(v)))  # noqa: E731
    assert found["auroc"] == pytest.approx(1 - tail(1 / math.sqrt(2)), abs=0.01)
    assert found["fpr_at_95_tpr"] == pytest.approx(tail(1 - 1.645), abs=0.02)
    assert found["tpr_at_1_fpr"] == pytest.approx(tail(2.326 - 1), abs=0.02)
    assert found["eer"] == pytest.approx(tail(0.5), abs=0.01)
    mirrored = scores.detection(-s, unknown)
    assert mirrored["auroc"] == pytest.approx(1 - found["auroc"])
    same = scores.detection(np.zeros(10), np.arange(10) < 5)
    assert same["auroc"] == 0.5 and same["fpr_at_95_tpr"] == 1 and same["tpr_at_1_fpr"] == 0


def test_equal_coverage_takes_the_least_doubtful():
    known = scores.accept_most_certain(np.array([0.3, 0.1, 0.2, 0.1]), 0.5)
    assert known.tolist() == [False, True, False, True]
    assert scores.accept_most_certain(np.zeros(4), 0.25).tolist() == [True, False, False, False]
    assert not scores.accept_most_certain(np.zeros(4), 0.0).any()


def test_bad_input_is_refused():
    with pytest.raises(BadInput, match="temperature=0"):
        scores.energy(np.zeros((2, 2)), 0)
    with pytest.raises(BadInput, match="temperature=-1"):
        scores.scaled_msp(np.zeros((2, 2)), -1)
    with pytest.raises(BadInput, match=r"\(N, K\)"):
        scores.msp(np.zeros(3))
    with pytest.raises(BadInput, match="needs both"):
        scores.detection([0.1, 0.2], [True, True])
    with pytest.raises(BadInput, match="finite"):
        scores.detection([0.1, float("nan")], [True, False])
    with pytest.raises(BadInput, match="coverage=2"):
        scores.accept_most_certain([0.1], 2)
