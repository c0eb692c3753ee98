from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.tasks import group_accuracy


def test_groups_against_a_loop():
    g = torch.Generator().manual_seed(0)
    counts = [101, 100, 60, 20, 19, 3]
    outputs, labels = torch.randn(300, 6, generator=g), torch.randint(6, (300,), generator=g)
    groups = {"many": [0], "medium": [1, 2, 3], "few": [4, 5]}
    expected = {}
    for name, classes in groups.items():
        hits = [int(o.argmax()) == int(y) for o, y in zip(outputs, labels) if int(y) in classes]
        expected[name] = sum(hits) / len(hits)
    assert group_accuracy(outputs, labels, counts) == pytest.approx(expected)


def test_a_group_without_images_is_left_out():
    assert group_accuracy(torch.eye(2), torch.tensor([0, 1]), [500, 400]) == {"many": 1.0}


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(BadInput, match=r"counts \(3,\)"):
        group_accuracy(torch.eye(2), torch.tensor([0, 1]), [1, 2, 3])
    with pytest.raises(BadInput, match="few=200"):
        group_accuracy(torch.eye(2), torch.tensor([0, 1]), [1, 2], few=200)
