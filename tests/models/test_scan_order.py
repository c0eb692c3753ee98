from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput, UnknownName
from vitkit.models.scan_order import KINDS, scan_order, visit_index


def steps(h, w, kind):
    order = scan_order(h, w, kind)
    return torch.stack([torch.div(order, w, rounding_mode="floor"), order % w]).diff(dim=1).abs()


@pytest.mark.parametrize("kind", KINDS)
def test_every_order_visits_every_cell_once(kind):
    for h in range(1, 13):
        for w in range(1, 13):
            order = scan_order(h, w, kind)
            assert order.dtype == torch.long
            assert torch.equal(order.sort().values, torch.arange(h * w))
            assert torch.equal(visit_index(order)[order], torch.arange(h * w))


@pytest.mark.parametrize("h", range(1, 25))
def test_gilbert_goes_to_neighbours_on_every_rectangle(h):
    for w in range(1, 25):
        order = scan_order(h, w, "gilbert")
        assert torch.equal(order.sort().values, torch.arange(h * w))
        step = steps(h, w, "gilbert")
        assert (step <= 1).all()
        diagonal = int((step.sum(0) == 2).sum())
        assert diagonal <= (0 if max(h, w) % 2 == 0 else 1), (h, w)


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_gilbert_is_the_hilbert_curve_on_squares_of_powers_of_two(side):
    ours = scan_order(side, side, "gilbert").argsort().reshape(side, side)
    hilbert = scan_order(side, side, "hilbert").argsort().reshape(side, side)
    forms = [torch.rot90(t, k) for t in (hilbert, hilbert.T) for k in range(4)]
    # walking the curve backwards is a symmetry too
    forms += [side * side - 1 - form for form in forms]
    assert any(torch.equal(ours, form) for form in forms)


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_hilbert_keeps_quadrants_together_and_makes_single_steps(side):
    assert (steps(side, side, "hilbert").sum(0) == 1).all()
    visit = scan_order(side, side, "hilbert").argsort().reshape(side, side)
    quarter = torch.div(visit, side * side // 4, rounding_mode="floor")
    for half_rows in quarter.split(side // 2, 0):
        for block in half_rows.split(side // 2, 1):
            assert (block == block[0, 0]).all()


def test_hilbert_on_other_grids_skips_cells_and_keeps_the_order_of_the_rest():
    visit = scan_order(8, 8, "hilbert").argsort().reshape(8, 8)[:5, :7]
    inside = scan_order(5, 7, "hilbert").argsort().reshape(5, 7)
    assert torch.equal(visit.flatten().argsort(), inside.flatten().argsort())


def test_snake_turns_at_the_end_of_a_row():
    assert (steps(5, 4, "snake").sum(0) == 1).all()
    assert scan_order(2, 3, "raster").tolist() == [0, 1, 2, 3, 4, 5]


def test_errors_say_what_is_allowed():
    with pytest.raises(UnknownName, match="hilbert"):
        scan_order(2, 2, "hilbrt")
    with pytest.raises(BadInput, match="at least 1"):
        scan_order(0, 2, "raster")


def test_the_result_is_the_callers_own():
    scan_order(3, 3, "gilbert")[0] = 99
    assert scan_order(3, 3, "gilbert").max() == 8
