from __future__ import annotations

import math

import numpy as np
import pytest

from vitkit.data import long_tail
from vitkit.errors import BadInput


@pytest.mark.parametrize(
    ("per_class", "classes", "factor"), [(5000, 10, 100), (500, 100, 10), (500, 100, 50), (30, 7, 1)]
)
def test_counts_follow_the_profile_exactly(per_class, classes, factor):
    labels = np.tile(np.arange(classes), per_class)
    rows = long_tail(labels, factor)
    wanted = [max(1, math.floor(per_class * factor ** (-c / (classes - 1)) + 1e-9)) for c in range(classes)]
    assert np.bincount(labels[rows]).tolist() == wanted
    assert wanted[0] == per_class and wanted[-1] == per_class // factor
    assert (np.diff(rows) > 0).all()


def test_the_rarest_class_decides_where_classes_differ():
    labels = np.repeat([0, 1, 2], [1000, 1000, 4])
    counts = np.bincount(labels[long_tail(labels, 100)])
    # 4 · 100 = 400 images of the first class are the most that the last can follow
    assert counts.tolist() == [400, 40, 4]


def test_order_and_seed():
    labels = np.repeat([3, 5, 9], 100)
    assert [(labels[long_tail(labels, 100, order=[9, 3, 5])] == c).sum() for c in (9, 3, 5)] == [100, 10, 1]
    first, again, other = (long_tail(labels, 10, seed=s) for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("labels", "options", "said"),
    [
        ([0, 1], {"factor": 0.5}, "factor=0.5"),
        ([0.5, 1.0], {}, "class numbers"),
        ([], {}, "class numbers"),
        ([0, 1, 2], {"order": [0, 1]}, "order="),
    ],
)
def test_wrong_input_is_named(labels, options, said):
    with pytest.raises(BadInput, match=said):
        long_tail(labels, **options)
