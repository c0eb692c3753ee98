"""Paths through space."""

from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput, UnknownName
from vitkit.models.point_order import AXES, POINT_ORDERS, point_order


def lattice(bits):
    side = torch.arange(2**bits).float()
    return torch.cartesian_prod(side, side, side)


@pytest.mark.parametrize("kind", POINT_ORDERS)
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_every_cell_is_visited_once(kind, bits):
    cells = lattice(bits)
    mixed = torch.randperm(len(cells), generator=torch.Generator().manual_seed(0))
    order = point_order(cells[mixed].unsqueeze(0), kind, bits)[0]
    assert sorted(order.tolist()) == list(range(len(cells)))
    # the path is that of the places, not of the numbers of the points
    assert torch.equal(cells[mixed][order], cells[point_order(cells.unsqueeze(0), kind, bits)[0]])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_hilbert_curve_goes_from_neighbour_to_neighbour(bits):
    cells = lattice(bits)
    steps = cells[point_order(cells.unsqueeze(0), "hilbert", bits)[0]].diff(dim=0).abs()
    assert bool((steps.sum(1) == 1).all())


def test_the_hilbert_curve_fills_octant_after_octant():
    cells = lattice(3)
    octants = (cells[point_order(cells.unsqueeze(0), "hilbert", 3)[0]] // 4).unflatten(0, (8, 64))
    assert bool((octants == octants[:, :1]).all()) and len(octants[:, 0].unique(dim=0)) == 8


def test_morton_takes_the_bits_in_turn():
    cells = lattice(2)
    visits = point_order(cells.unsqueeze(0), "morton", 2)[0].argsort()
    for cell, visit in zip(cells.long().tolist(), visits.tolist()):
        x, y, z = (format(c, "02b") for c in cell)
        assert visit == int("".join(x[i] + y[i] + z[i] for i in range(2)), 2)


@pytest.mark.parametrize("kind", AXES)
def test_axis_orders_are_lexicographic(kind):
    cells = lattice(2)
    order = point_order(cells.unsqueeze(0), kind, 2)[0]
    expected = sorted(range(64), key=lambda i: tuple(float(cells[i, "xyz".index(a)]) for a in kind))
    assert order.tolist() == expected


@pytest.mark.parametrize("kind", ["hilbert", "morton", "zyx"])
def test_place_scale_and_precision_do_not_matter(kind):
    cloud = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    order = point_order(cloud, kind)
    assert torch.equal(order, point_order(cloud * 4 + 64, kind)) and torch.equal(
        order, point_order(cloud.double(), kind)
    )


def test_points_of_one_cell_keep_their_order():
    cloud = torch.tensor([[[1.0, 0, 0], [0, 0, 0], [0.01, 0, 0], [0.005, 0, 0]]])
    assert point_order(cloud, "hilbert")[0].tolist()[:3] in ([1, 2, 3], [0, 1, 2])
    assert point_order(torch.ones(1, 5, 3)).tolist() == [list(range(5))]


def test_what_is_refused():
    with pytest.raises(UnknownName, match="hilbert"):
        point_order(torch.zeros(1, 2, 3), "hilbrt")
    with pytest.raises(BadInput, match="bits=21"):
        point_order(torch.zeros(1, 2, 3), bits=21)
    with pytest.raises(BadInput, match="1×2×2"):
        point_order(torch.zeros(1, 2, 2))
