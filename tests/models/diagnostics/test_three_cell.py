from __future__ import annotations

from collections import Counter

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.diagnostics.three_cell import (
    LABELS,
    majority_score,
    three_cell,
    three_cell_data,
    three_cell_labels,
    three_cell_score,
)
from vitkit.testing.worlds import tiny_vit


@pytest.fixture(scope="module")
def data():
    return three_cell_data(900, cells=8, cell_px=2, seed=4)


def test_all_nine_cases_are_equally_frequent(data):
    _, labels, _ = data
    case = Counter(map(tuple, labels[:, [0, 1, 3, 4]].int().tolist()))
    assert len(case) == 9
    assert set(case.values()) == {100}


def test_a_surplus_over_nine_is_spread():
    _, labels, _ = three_cell_data(22, seed=1)
    case = Counter(map(tuple, labels[:, [0, 1, 3, 4]].int().tolist()))
    assert sorted(case.values()) == [2] * 5 + [3] * 4


def test_labels_follow_the_definitions(data):
    _, labels, places = data
    for (r, g, b), row in zip(places[:200].tolist(), labels[:200].tolist()):
        (xr, yr), (xg, yg), (xb, yb) = r, g, b
        rg, rb = (xr - xg) ** 2 + (yr - yg) ** 2, (xr - xb) ** 2 + (yr - yb) ** 2
        area_rg, area_rb = abs((yr + yg) * (xg - xr)) / 2, abs((yr + yb) * (xb - xr)) / 2
        turn = (xg - xr) * (yb - yr) - (yg - yr) * (xb - xr)
        assert turn != 0
        outside = xr + xg + xb > 7 and yr + yg + yb > 7
        assert row == [rg > rb, rb > rg, turn > 0, area_rg > area_rb, area_rb > area_rg, outside]


def test_both_pairs_are_antisymmetric(data):
    _, labels, places = data
    assert not (labels[:, 0] * labels[:, 1]).any()
    assert not (labels[:, 3] * labels[:, 4]).any()
    swapped = three_cell_labels(places[:, [0, 2, 1]], 8).float()
    assert torch.equal(swapped[:, [1, 0]], labels[:, :2])
    assert torch.equal(swapped[:, [4, 3]], labels[:, 3:5])
    assert torch.equal(swapped[:, 2], 1 - labels[:, 2])
    assert torch.equal(swapped[:, 5], labels[:, 5])


def test_images_show_the_places(data):
    images, _, places = data
    assert images.shape == (900, 3, 16, 16)
    assert set(images.unique().tolist()) == {0.0, 1.0}
    assert (images.sum((-2, -1)) == 4).all()
    assert images.sum(1).max() == 1
    for colour in range(3):
        x, y = places[:, colour].unbind(-1)
        assert (images[torch.arange(900), colour, 2 * y + 1, 2 * x] == 1).all()


def test_placements_differ_and_follow_the_seed(data):
    images, _, places = data
    assert len(places.flatten(1).unique(dim=0)) == 900
    again = three_cell_data(900, cells=8, cell_px=2, seed=4)[0]
    other = three_cell_data(900, cells=8, cell_px=2, seed=5)[0]
    assert torch.equal(images, again)
    assert not torch.equal(images, other)


def test_majority_is_two_thirds_and_a_half(data):
    _, labels, _ = data
    base = majority_score(labels)
    assert base.distance == pytest.approx(2 / 3)
    assert base.area == pytest.approx(2 / 3)
    assert 0.5 <= base.orientation < 0.58
    assert base.mean == pytest.approx((base.distance + base.area + base.orientation + base.vector_sum) / 4)


def test_scores_of_right_and_wrong_answers(data):
    _, labels, _ = data
    assert three_cell_score(labels - 0.5, labels).mean == 1
    assert three_cell_score(0.5 - labels, labels).mean == 0


def test_too_few_placements_and_bad_sizes_are_refused():
    with pytest.raises(BadInput, match="more cells or fewer images"):
        three_cell_data(2000, cells=4)
    with pytest.raises(BadInput, match="at least|≥"):
        three_cell_data(0)


def test_the_benchmark_trains_and_scores_a_model():
    seen = []

    def factory(**sizes):
        seen.append(sizes)
        return tiny_vit(embed_dim=16, depth=1, num_heads=2, **sizes)

    first = three_cell(factory, num_train=64, num_test=36, cells=6, cell_px=2, epochs=1)
    second = three_cell(factory, num_train=64, num_test=36, cells=6, cell_px=2, epochs=1)
    assert seen[0] == {"img_size": 12, "patch_size": 2, "in_chans": 3, "num_classes": len(LABELS)}
    assert first == second
    assert 0 <= first.mean <= 1
