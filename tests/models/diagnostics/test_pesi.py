from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr

from vitkit.errors import BadInput
from vitkit.models.diagnostics.pesi import pesi


def places(h, w):
    return torch.cartesian_prod(torch.arange(h), torch.arange(w)).double()


def from_similarity(function, h, w):
    """Unit vectors with the given similarity as a function of squared distance, by a Cholesky factor."""
    squared = torch.cdist(places(h, w), places(h, w)).square().round()
    return torch.linalg.cholesky(function(squared)).reshape(h, w, -1)


@pytest.mark.parametrize("size", [(5, 5), (4, 7), (8, 8)])
def test_similarity_that_falls_with_distance_is_ideal(size):
    score = pesi(from_similarity(lambda d2: torch.exp(-d2 / 4), *size))
    assert score.monotonicity == pytest.approx(2, abs=1e-9)
    assert score.directed == pytest.approx(2, abs=1e-9)
    assert score.asymmetry == pytest.approx(0, abs=1e-9)


def test_similarity_that_rises_with_distance_scores_zero():
    def rising(squared):
        # diagonally dominant, so positive definite
        return torch.where(squared == 0, 1.0, 0.01 + squared / 5000)

    score = pesi(from_similarity(rising, 5, 5))
    assert score.monotonicity == pytest.approx(0, abs=1e-9)
    assert score.directed == pytest.approx(0, abs=1e-9)


def test_a_constant_table_is_undefined_and_not_nan():
    score = pesi(torch.ones(5, 6, 8))
    assert score.monotonicity is None
    assert score.directed is None
    assert score.asymmetry == pytest.approx(0, abs=1e-12)


def test_orthogonal_vectors_have_no_score_at_all():
    score = pesi(torch.eye(12).reshape(3, 4, 12))
    assert (score.monotonicity, score.directed, score.asymmetry) == (None, None, None)


def test_matches_the_definition_written_out_cell_by_cell():
    torch.manual_seed(3)
    h, w = 4, 5
    table = torch.randn(h, w, 6).double() + 1.5
    vectors = torch.nn.functional.normalize(table.flatten(0, 1), dim=1)
    at = places(h, w)
    falls, spreads = [], []
    for c in range(h * w):
        rings: dict[int, list[float]] = {}
        for j in range(h * w):
            if j != c:
                rings.setdefault(int((at[j] - at[c]).square().sum()), []).append(float(vectors[c] @ vectors[j]))
        radii = sorted(rings)
        means = [sum(rings[r]) / len(rings[r]) for r in radii]
        falls.append(1 - spearmanr(radii, means)[0])
        spreads += [(sum((v - m) ** 2 for v in rings[r]) / len(rings[r])) ** 0.5 / abs(m) for r, m in zip(radii, means)]
    score = pesi(table)
    assert score.monotonicity == pytest.approx(sum(falls) / len(falls))
    assert score.asymmetry == pytest.approx(sum(spreads) / len(spreads))


def test_directions_are_judged_apart():
    # similarity falls along every ray, but at different speed along rows and columns
    at = places(6, 6)
    offset = (at[:, None] - at[None]).square()
    table = torch.linalg.cholesky(torch.exp(-offset[..., 0] / 2 - offset[..., 1] / 40) + 1e-12 * torch.eye(36))
    score = pesi(table.reshape(6, 6, -1))
    assert score.directed > score.monotonicity
    assert score.asymmetry > 0.1


def test_scale_and_input_stay_out_of_it():
    table = torch.randn(4, 4, 8)
    kept = table.clone()
    first, second = pesi(table), pesi(table * 7)
    assert first.monotonicity == pytest.approx(second.monotonicity)
    assert torch.equal(table, kept)


@pytest.mark.parametrize("table", [torch.ones(4, 4), torch.zeros(3, 3, 4), torch.full((3, 3, 4), float("nan"))])
def test_unusable_tables_are_refused(table):
    with pytest.raises(BadInput):
        pesi(table)


def test_directed_monotonicity_sector_by_sector():
    torch.manual_seed(1)
    h, w, buckets = 4, 5, 8
    table = torch.randn(h, w, 6).double() + 1.0
    vectors = torch.nn.functional.normalize(table.flatten(0, 1), dim=1)
    at = places(h, w)
    falls = []
    for c in range(h * w):
        sectors: dict[int, dict[int, list[float]]] = {}
        for j in range(h * w):
            if j != c:
                down, right = (at[j] - at[c]).tolist()
                turn = (math.atan2(down, right) + math.pi) / (2 * math.pi) + 1e-12
                rings = sectors.setdefault(int(turn * buckets) % buckets, {})
                rings.setdefault(int(down**2 + right**2), []).append(float(vectors[c] @ vectors[j]))
        for rings in sectors.values():
            if sum(map(len, rings.values())) >= 3 and len(rings) >= 2:
                radii = sorted(rings)
                falls.append(1 - spearmanr(radii, [sum(rings[r]) / len(rings[r]) for r in radii])[0])
    assert pesi(table, buckets).directed == pytest.approx(sum(falls) / len(falls))
