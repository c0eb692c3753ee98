from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput, UnknownName
from vitkit.models.scan_order import (
    CUBES,
    KINDS,
    OMNI,
    PAIRS,
    cube_order,
    join_pair,
    scan_order,
    split_pair,
    visit_index,
)


def steps(h, w, kind):
    order = scan_order(h, w, kind)
    return torch.stack([torch.div(order, w, rounding_mode="floor"), order % w]).diff(dim=1).abs()


@pytest.mark.parametrize("kind", [*KINDS, "raster_rev", "column_rev", "local:3", "local_rev:7", "atrous:3", "random:5"])
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


def by_row(order, w):
    return [divmod(int(cell), w) for cell in order]


@pytest.mark.parametrize("kind", [*KINDS, "local:3", "atrous:3", "random:5"])
def test_reverse_walks_backwards(kind):
    name, colon, number = kind.partition(":")
    assert torch.equal(scan_order(5, 7, f"{name}_rev{colon}{number}"), scan_order(5, 7, kind).flip(0))


def test_columns_are_the_rows_of_the_transposed_grid():
    for rows, columns in (("raster", "column"), ("snake_h", "snake_v")):
        transposed = [c * 7 + r for r, c in by_row(scan_order(7, 5, rows), 5)]
        assert scan_order(5, 7, columns).tolist() == transposed
    assert torch.equal(scan_order(5, 7, "snake"), scan_order(5, 7, "snake_h"))
    assert (steps(5, 7, "snake_v").sum(0) == 1).all()


def test_diagonals_go_line_by_line():
    assert scan_order(3, 3, "diagonal").tolist() == [6, 3, 7, 0, 4, 8, 1, 5, 2]
    assert scan_order(3, 3, "antidiagonal").tolist() == [0, 1, 3, 2, 4, 6, 5, 7, 8]
    for kind, sign in (("diagonal", -1), ("antidiagonal", 1)):
        lines = [c + sign * r for r, c in by_row(scan_order(4, 7, kind), 7)]
        assert lines == sorted(lines)
    assert len({tuple(scan_order(4, 5, kind).tolist()) for kind in OMNI}) == 8


@pytest.mark.parametrize("side", [1, 2, 3, 7])
def test_local_finishes_a_window_before_the_next(side):
    windows = [(r // side, c // side) for r, c in by_row(scan_order(5, 8, f"local:{side}"), 8)]
    assert windows == sorted(windows), "windows by rows, none visited twice"
    assert scan_order(4, 4, "local:2").tolist()[:8] == [0, 1, 4, 5, 2, 3, 6, 7]
    assert torch.equal(scan_order(5, 8, "local:8"), scan_order(5, 8, "raster"))


@pytest.mark.parametrize("rate", [1, 2, 3])
def test_atrous_finishes_a_sub_grid_before_the_next(rate):
    grids = [(r % rate, c % rate) for r, c in by_row(scan_order(5, 8, f"atrous:{rate}"), 8)]
    assert grids == sorted(grids)
    assert scan_order(4, 4, "atrous:2").tolist()[:8] == [0, 2, 8, 10, 1, 3, 9, 11]
    assert torch.equal(scan_order(5, 8, "atrous:1"), scan_order(5, 8, "raster"))


def test_spirals_go_to_neighbours_and_end_in_the_middle():
    assert scan_order(3, 4, "spiral_in").tolist() == [0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6]
    assert scan_order(5, 5, "spiral_out")[0] == 12
    for h, w in ((1, 6), (6, 1), (5, 8), (8, 5)):
        assert (steps(h, w, "spiral_in").sum(0) == 1).all()


def test_random_is_the_same_for_one_seed_only():
    first = scan_order(6, 6, "random:1")
    assert torch.equal(first, scan_order(6, 6, "random:1"))
    assert not torch.equal(first, scan_order(6, 6, "random:2"))
    assert torch.equal(scan_order(6, 6, "random"), scan_order(6, 6, "random:0"))


@pytest.mark.parametrize(
    ("kind", "said"), [("local:x", "whole number"), ("atrous:0", "at least 1"), ("raster:2", "no")]
)
def test_numbers_behind_the_colon_are_checked(kind, said):
    with pytest.raises(BadInput, match=said):
        scan_order(3, 3, kind)


@pytest.mark.parametrize("how", PAIRS)
def test_pairs_split_into_what_was_joined(how):
    a, b = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    joined = join_pair(a, b, how)
    assert joined.shape == ((2, 5, 6) if how == "parallel" else (2, 10, 3))
    assert all(torch.equal(x, y) for x, y in zip(split_pair(joined, how), (a, b)))
    if how == "interleave":
        assert torch.equal(joined[:, 2], a[:, 1]) and torch.equal(joined[:, 3], b[:, 1])
    with pytest.raises(UnknownName, match="interleave"):
        join_pair(a, b, "interleaved")
    with pytest.raises(BadInput, match="one shape"):
        join_pair(a, b[:, :4], how)


@pytest.mark.parametrize("kind", CUBES)
def test_cubes_visit_every_cell_once_and_are_planes_with_one_band(kind):
    order = cube_order(4, 3, 5, kind)
    assert torch.equal(order.sort().values, torch.arange(60))
    assert torch.equal(cube_order(1, 3, 5, kind, "snake"), scan_order(3, 5, "snake"))


def test_spectral_and_joint_cubes_stay_where_they_say():
    cells = cube_order(4, 3, 5, "spectral") % 15
    assert torch.equal(cells.reshape(15, 4), scan_order(3, 5).unsqueeze(1).expand(15, 4))
    joint = cube_order(4, 3, 5, "joint", "snake")
    places = torch.stack([joint // 15, joint % 15 // 5, joint % 5])
    assert (places.diff(dim=1).abs().sum(0) == 1).all()
