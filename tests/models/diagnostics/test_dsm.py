"""Measurements of attention matrices against closed forms and optimality conditions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.diagnostics import (
    attention_entropy,
    birkhoff_distance,
    dsm_error,
    expressivity,
    project_to_birkhoff,
)
from vitkit.models.parts.normalizers.qontot import QontOT
from vitkit.models.parts.normalizers.sinkhorn import Sinkhorn


def test_dsm_error_counts_valid_tokens_only() -> None:
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    assert dsm_error(weights).rows == 1 and dsm_error(weights).columns == 1
    error = dsm_error(weights, torch.tensor([True, True, False]))
    assert error.rows == 0 and error.columns == 0
    with pytest.raises(BadInput, match="square"):
        dsm_error(torch.zeros(2, 3))


def permutations(n: int) -> torch.Tensor:
    eye = torch.eye(n, dtype=torch.float64)
    return torch.stack([eye[list(p)] for p in itertools.permutations(range(n))])


@pytest.mark.parametrize("n", [2, 3, 4])
def test_projection_meets_the_optimality_condition_at_every_vertex(n: int) -> None:
    x = 2 * torch.randn(5, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    y = project_to_birkhoff(x)
    error = dsm_error(y)
    assert error.rows.max() < 1e-8 and error.columns.max() < 1e-8 and y.min() > -1e-8
    # y is the nearest point of a convex set iff no vertex lies on x's side of the plane through y
    slope = ((x - y)[:, None] * (permutations(n) - y[:, None])).sum((-2, -1))
    assert slope.max() < 1e-6


def test_distance_is_zero_on_the_polytope_and_known_for_two_tokens() -> None:
    assert birkhoff_distance(permutations(3)).max() < 1e-8
    # n=2: the polytope is the segment [[t, 1-t], [1-t, t]]; of [[1,0],[1,0]] the nearest point has t = 1/2
    assert math.isclose(birkhoff_distance(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).item(), 1.0, abs_tol=1e-8)
    x = torch.randn(4, 1, 6, 6)
    assert (birkhoff_distance(Sinkhorn(3)(x)) > birkhoff_distance(Sinkhorn(51)(x))).all()


def test_projection_says_when_it_cannot() -> None:
    with pytest.raises(RuntimeError, match="raise one"):
        project_to_birkhoff(10 * torch.randn(5, 5), max_iter=1)
    with pytest.raises(BadInput, match="NaN"):
        project_to_birkhoff(torch.full((2, 2), math.nan))


def test_entropy_limits() -> None:
    assert attention_entropy(torch.eye(5)) == 0
    torch.testing.assert_close(attention_entropy(torch.full((3, 5, 5), 0.2)), torch.full((3,), math.log(5)))


def test_expressivity_counts_distinct_outputs() -> None:
    # softmax of two tokens sees only the sign pattern of the difference in each row: 3 × 3
    assert expressivity(lambda s: s.softmax(-1), 2) == 9
    assert expressivity(lambda s: s, 2, levels=3) == 81
    circuit = QontOT(2, ancillas=1, gain=1.0)
    assert expressivity(circuit, 2, low=0.3) == 16
    # on a cube around zero the signs of rotations cancel in |U|²
    assert expressivity(circuit, 2, low=-1.0) < 16
    with pytest.raises(BadInput, match="max_inputs"):
        expressivity(lambda s: s, 5)
