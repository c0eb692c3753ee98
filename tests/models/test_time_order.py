"""Orders of several dates or bands: permutations, what they do to two dates, and scans along them."""

from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput, UnknownName
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.mamba import Mamba
from vitkit.models.parts.mixers.mamba2 import Mamba2
from vitkit.models.parts.mixers.ss2d import SS2D
from vitkit.models.parts.mixers.vim import Vim
from vitkit.models.scan_order import join_pair, scan_order, visit_index
from vitkit.models.ssm import SelectiveSSM
from vitkit.models.time_order import DATES, split_kind, time_order
from vitkit.models.token_line import TokenLine, apart, in_turn, on_planes

PLANES = ("raster", "snake_v_rev", "hilbert", "local:2", "random:3")


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("how", DATES)
def test_every_cell_is_visited_once_and_the_order_is_undone(how, plane):
    for grid in ((1, 3, 5), (2, 3, 5), (4, 2, 3), (3, 1, 1)):
        order = time_order(grid, f"{how}/{plane}")
        cells = grid[0] * grid[1] * grid[2]
        assert torch.equal(order.sort().values, torch.arange(cells))
        x = torch.randn(cells)
        assert torch.equal(x[order][visit_index(order)], x)
    plain = scan_order(3, 5, plane)
    assert torch.equal(time_order((3, 5), f"{how}/{plane}"), plain), "one date: the plane's own order"
    assert torch.equal(time_order((1, 3, 5), f"{how}/{plane}"), plain)


@pytest.mark.parametrize("how", ["sequential", "interleave"])
def test_two_dates_stand_as_a_joined_pair(how):
    a, b = torch.randn(2, 2, 15, 3).unbind(0)
    plane = scan_order(3, 5, "snake")
    joined = torch.cat([a, b], 1)[:, time_order((2, 3, 5), f"{how}/snake")]
    assert torch.equal(joined, join_pair(a[:, plane], b[:, plane], how))


def test_parallel_dates_stand_as_channels():
    a, b = torch.randn(2, 2, 15, 3).unbind(0)
    plane = scan_order(3, 5, "column")
    line = torch.cat([a, b], 1)[:, time_order((2, 3, 5), "parallel/column")]
    assert torch.equal(line.unflatten(1, (15, 2)).flatten(2), join_pair(a[:, plane], b[:, plane], "parallel"))


def test_joint_steps_between_dates_stay_at_their_cell():
    path = time_order((4, 3, 5), "joint/snake")
    date, row, column = path // 15, path % 15 // 5, path % 5
    assert bool((torch.stack([date, row, column]).diff(dim=1).abs().sum(0) == 1).all())


def test_names():
    assert split_kind("interleave/") == ("interleave", "raster")
    assert torch.equal(time_order((2, 2, 3), "column"), time_order((2, 2, 3), "sequential/column"))
    with pytest.raises(UnknownName, match="interleave"):
        time_order((2, 2, 3), "interleaved/raster")
    with pytest.raises(UnknownName, match="raster"):
        time_order((2, 2, 3), "interleave/rastr")
    with pytest.raises(BadInput, match="2×2×2×2"):
        time_order((2, 2, 2, 2))
    with pytest.raises(BadInput, match="all be parallel"):
        SS2D(8, "parallel,raster")
    with pytest.raises(BadInput, match="no parallel"):
        Mamba2(8, "parallel")


# -- along a line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("count", [0, 2])
def test_lines_through_dates_are_undone(count, mirrored):
    line = TokenLine(("interleave/snake", "joint", "hilbert"), mirrored, "middle", grid=(2, 3, 4))
    for grid in ((2, 3, 4), (3, 2, 5), (4, 4)):
        layout = TokenLayout(grid=grid, prefix=(("class", count),) if count else ())
        rows = torch.randn(2, count + layout.num_original, 3)
        paths = line.paths(layout, 2, rows.device)
        back = line.restore(line.gather(rows, paths), paths)
        assert torch.equal(back, rows.unsqueeze(2).expand_as(back))
        patches = [r - count for r in paths.rows[:, 0].tolist() if r >= count]
        assert patches == time_order(grid, "interleave/snake").tolist()


def test_apart_and_back():
    lines = torch.randn(2, 12, 3, 5)
    dates = apart(lines, 4)
    assert dates.shape == (8, 3, 3, 5) and torch.equal(dates[5], lines[1, 1::4])
    assert torch.equal(in_turn(dates, 4), lines)
    assert apart(lines, 1) is lines


def test_planes_are_convolved_one_by_one():
    conv = torch.nn.Conv2d(3, 3, 3, padding=1, groups=3)
    rows = torch.randn(2, 24, 3)
    out = on_planes(conv, rows, (2, 3, 4))
    second = conv(rows[:, 12:].mT.unflatten(2, (3, 4))).flatten(2).mT
    assert torch.allclose(out[:, 12:], second, atol=1e-6)
    assert torch.equal(on_planes(conv, rows[:, :12], (3, 4)), on_planes(conv, rows, (2, 3, 4))[:, :12])


# -- scans -------------------------------------------------------------------------------------------------------------


def reach(mixer, layout, row, dim=8):
    """Rows that the update of ``row`` depends on."""
    x = torch.randn(1, layout.num_prefix + layout.num_original, dim, requires_grad=True)
    mixer(x, layout)[0, row].sum().backward()
    return set((x.grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist())


def test_who_hears_whom():
    layout = TokenLayout(grid=(2, 2, 3))
    first, second = set(range(6)), set(range(6, 12))
    assert reach(Mamba(8, "sequential"), layout, 2) == {0, 1, 2}
    assert reach(Mamba(8, "sequential"), layout, 6) == first | {6}
    assert reach(Mamba(8, "interleave"), layout, 2) == {0, 6, 1, 7, 2}
    assert reach(Mamba(8, "interleave"), layout, 8) == {0, 6, 1, 7, 2, 8}
    # side by side: both dates up to this cell, since Δ, B and C are common
    assert reach(Mamba(8, "parallel"), layout, 2) == {0, 1, 2, 6, 7, 8}
    assert reach(Vim(8, "parallel"), layout, 8) == first | second
    assert reach(SS2D(8, "parallel,parallel/raster_rev", num_prefix=0), layout, 0) == first | second


def by_channels(ssm: SelectiveSSM, x: torch.Tensor) -> SelectiveSSM:
    """The layer on T·E channels whose weights are those of ``ssm``, T times."""
    dates = x.shape[1] // ssm.D.shape[1]
    wide = SelectiveSSM(x.shape[1], 1, ssm.sizes[1], ssm.sizes[0])
    with torch.no_grad():
        wide.x_proj.copy_(ssm.x_proj.repeat(1, 1, dates) / dates)
        for name in ("dt_proj", "dt_bias", "A_log", "D"):
            getattr(wide, name).copy_(torch.cat([getattr(ssm, name)] * dates, 1))
    return wide


@pytest.mark.parametrize("dates", [1, 2, 3])
def test_common_selection_is_the_layer_on_dates_as_channels(dates):
    ssm = SelectiveSSM(6, 1, 4, 2)
    x = torch.randn(2, dates, 9, 6)
    together = ssm(x.flatten(0, 1).unsqueeze(2), common=dates).view(x.shape)
    beside = x.transpose(1, 2).flatten(2)
    wide = by_channels(ssm, beside[0])(beside.unsqueeze(2)).squeeze(2)
    assert torch.allclose(together.transpose(1, 2).flatten(2), wide, atol=1e-5)


@pytest.mark.parametrize("make", [lambda order: Vim(8, order), lambda order: SS2D(8, order, num_prefix=0)])
@pytest.mark.parametrize("how", DATES)
def test_one_date_is_the_plane(make, how):
    mixer = make(f"{how}/snake")
    plain = make("snake")
    plain.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 15, 8)
    out = plain(x, TokenLayout(grid=(3, 5)))
    assert torch.allclose(mixer(x, TokenLayout(grid=(1, 3, 5))), out, atol=1e-6)
    assert torch.allclose(mixer(x, TokenLayout(grid=(3, 5))), out, atol=1e-6)


def test_parallel_dates_are_exchangeable_and_prefix_tokens_stand_outside():
    mixer, layout = Vim(8, "parallel"), TokenLayout(grid=(2, 3, 5))
    x = torch.randn(2, 30, 8)
    swapped = mixer(torch.cat([x[:, 15:], x[:, :15]], 1), layout)
    assert torch.allclose(swapped, torch.cat([*mixer(x, layout).chunk(2, 1)][::-1], 1), atol=1e-5)
    with_class = layout.replace(prefix=(("class", 1),))
    with pytest.raises(BadInput, match="attend"):
        mixer(torch.randn(2, 31, 8), with_class)
    assert Vim(8, "parallel", prefix="attend")(torch.randn(2, 31, 8), with_class).shape == (2, 31, 8)


def test_merged_dates_are_refused_by_name():
    layout = TokenLayout(grid=(2, 3, 5)).take(torch.tensor([[0, 3, 20]]))
    with pytest.raises(ValueError, match="dates|frame"):
        Vim(8, "interleave")(torch.randn(1, 3, 8), layout)
