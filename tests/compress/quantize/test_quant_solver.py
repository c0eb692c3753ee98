from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitkit.compress.quantize.grid import Grid
from vitkit.compress.quantize.solver import inverse_factor, prepare, round_to_nearest, shifted_target, solve
from vitkit.errors import BadInput, VitkitError

NUM_OUT, N = 10, 24


def _layer(seed: int = 0, noise: float = 0.3, n: int = N, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """A weight and two correlated inputs X (n, N), X̃ whose difference is a linear image of X plus noise."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(NUM_OUT, n, generator=g, dtype=torch.float64)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
    x = (torch.eye(n, dtype=torch.float64) + 0.5 * mix) @ torch.randn(n, tokens, generator=g, dtype=torch.float64)
    drift = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
    x_full = x + noise * (drift @ x + 0.3 * torch.randn(n, tokens, generator=g, dtype=torch.float64))
    return weight, x, x_full


def _statistics(x: Tensor, x_full: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x @ x.T / 50, 2 * (x_full - x) @ x.T / 50


def _loss(q: Tensor, weight: Tensor, x: Tensor, x_full: Tensor) -> float:
    return float((q @ x - weight @ x_full).square().sum() / (weight @ x_full).square().sum())


GRIDS = {
    "channel": Grid(bits=3, clip_search=True),
    "symmetric": Grid(bits=4, symmetric=True),
    "group": Grid(bits=3, granularity="group", group_size=6),
}


def obq(weight: Tensor, h: Tensor, d: Tensor | None, grid: Grid, alpha: float, damp: float, act_order: bool) -> Tensor:
    """The same greedy rule with an explicit inverse of H over the free columns at every step."""
    n = weight.shape[1]
    h = h + damp * h.diagonal().mean() * torch.eye(n, dtype=h.dtype)
    scale, zero = grid.fit(weight)
    if grid.granularity == "group":
        scale, zero = (t.repeat_interleave(grid.group_size, 1) for t in (scale, zero))
    else:
        scale, zero = scale.expand(-1, n), zero.expand(-1, n)
    column_grid = Grid(bits=grid.bits, symmetric=grid.symmetric)
    order = h.diagonal().argsort(descending=True).tolist() if act_order else list(range(n))
    w, q = weight.clone(), torch.zeros_like(weight)
    for step, column in enumerate(order):
        free, later = order[step:], order[step + 1 :]
        inverse = torch.linalg.inv(h[free][:, free])
        old = w[:, column].clone()
        q[:, column] = column_grid(old[:, None], scale[:, column, None], zero[:, column, None])[:, 0]
        error = (old - q[:, column]) / inverse[0, 0]
        w[:, free] -= error[:, None] * inverse[0]
        if d is not None and later:
            row = alpha * d[column, later] @ torch.linalg.inv(h[later][:, later])
            w[:, later] += old[:, None] * row
    return q


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("alpha", [None, 0.25, 1.0])
def test_equals_the_reference_with_explicit_inverses(name, act_order, alpha):
    weight, x, x_full = _layer(1)
    h, d = _statistics(x, x_full)
    cross = None if alpha is None else d
    found = solve(weight, h, cross, GRIDS[name], alpha=alpha or 0.0, damp=0.05, act_order=act_order, block_size=5)
    expected = obq(weight, h, cross, GRIDS[name], alpha or 0.0, 0.05, act_order)
    torch.testing.assert_close(found.weight, expected, rtol=1e-9, atol=1e-9)
    grid = GRIDS[name]
    torch.testing.assert_close(grid.value(found.codes, found.scale, found.zero), found.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_rows_of_p_are_submatrix_inverses(alpha):
    _, x, x_full = _layer(2)
    h, d = _statistics(x, x_full)
    upper, used = inverse_factor(h, 0.01)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(N, dtype=h.dtype)
    assert used == 0.01
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-8, atol=1e-8)
    assert torch.equal(upper, upper.triu())
    p = alpha * torch.triu(d @ upper.T, 1) @ upper
    assert float(p.tril().abs().max()) < 1e-12
    for q in range(N - 1):
        row = alpha * d[q, q + 1 :] @ torch.linalg.inv(damped[q + 1 :, q + 1 :])
        torch.testing.assert_close(p[q, q + 1 :], row, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("use_cross", [True, False])
def test_block_size_changes_nothing_with_the_values_before_rounding(name, static_groups, act_order, use_cross):
    weight, x, x_full = _layer(3)
    h, d = _statistics(x, x_full)
    runs = [
        solve(
            weight,
            h,
            d if use_cross else None,
            GRIDS[name],
            alpha=1.0,
            static_groups=static_groups,
            act_order=act_order,
            block_size=size,
        )
        for size in (1, 8, 7, N)
    ]
    for run in runs[1:]:
        assert torch.equal(run.codes, runs[0].codes)
        torch.testing.assert_close(run.weight, runs[0].weight, rtol=1e-9, atol=1e-9)


def test_block_size_matters_for_the_released_residual():
    weight, x, x_full = _layer(3)
    h, d = _statistics(x, x_full)
    grid = GRIDS["channel"]
    runs = [solve(weight, h, d, grid, alpha=1.0, residual="released", block_size=b) for b in (8, N)]
    step = runs[0].scale.expand_as(weight)
    assert float(((runs[0].weight - runs[1].weight).abs() / step).max()) > 0.99
    # plain GPTQ is touched by it in dynamic groups only
    plain = [solve(weight, h, None, grid, residual=r, block_size=8).codes for r in ("pre", "released")]
    assert torch.equal(*plain)
    group = GRIDS["group"]
    dynamic = [
        solve(weight, h, None, group, static_groups=False, residual=r, block_size=8).weight for r in ("pre", "released")
    ]
    assert not torch.allclose(*dynamic)


def released_loop(
    weight: Tensor, h: Tensor, d: Tensor | None, bits: int, group: int, static: bool, act_order: bool, alpha: float
) -> Tensor:
    """The released solver as it is described, written apart from ours: lists of columns, its own grid."""
    top, n, block = 2**bits - 1, weight.shape[1], 128

    def fit(part: Tensor) -> tuple[Tensor, Tensor]:
        low, high = part.min(1).values.clamp(max=0), part.max(1).values.clamp(min=0)
        flat = (low == 0) & (high == 0)
        low, high = low - flat.to(low), high + flat.to(high)
        s = (high - low) / top
        return s, torch.round(-low / s)

    def rounded(w: Tensor, step: tuple[Tensor, Tensor]) -> Tensor:
        s, z = step
        return s * (torch.clamp(torch.round(w / s) + z, 0, top) - z)

    work, hh = weight.clone(), h.clone()
    dd = torch.zeros_like(h) if d is None else d.clone()
    step = fit(work) if group == -1 else None
    for j in range(n):
        if hh[j, j] == 0:
            hh[j, j], work[:, j], dd[:, j] = 1, 0, 0
    steps = [fit(work[:, j : j + group]) for j in range(0, n, group)] if static and group != -1 else []
    order = list(range(n))
    if act_order:
        order = hh.diagonal().argsort(descending=True).tolist()
    work, hh, dd = work[:, order], hh[order][:, order], dd[order][:, order]
    hh = hh + 0.1 * hh.diagonal().mean() * torch.eye(n, dtype=h.dtype)
    u = torch.linalg.cholesky(torch.linalg.inv(hh)).T
    p = alpha * torch.triu(dd @ u.T, 1) @ u
    quantized = torch.zeros_like(work)
    for start in range(0, n, block):
        stop = min(start + block, n)
        columns = [work[:, j].clone() for j in range(start, stop)]
        errors = []
        for i in range(stop - start):
            j = start + i
            if group != -1 and not static and j % group == 0:
                # reads the matrix as it stood when the block began
                step = fit(work[:, j : j + group])
            elif group != -1 and static:
                step = steps[order[j] // group]
            w = columns[i].clone()
            quantized[:, j] = rounded(w, step)
            error = (w - quantized[:, j]) / u[j, j]
            errors.append(error)
            for k in range(i, stop - start):
                columns[k] = columns[k] - (error * u[j, start + k] - w * p[j, start + k])
        for k in range(stop, n):
            # the overwritten columns, not the values they had before
            move = sum(errors[i] * u[start + i, k] - columns[i] * p[start + i, k] for i in range(stop - start))
            work[:, k] = work[:, k] - move
    back = torch.empty_like(quantized)
    back[:, order] = quantized
    return back


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("group", "static"), [(-1, True), (32, True), (32, False), (80, False)])
@pytest.mark.parametrize("use_cross", [True, False])
def test_released_residual_reproduces_the_released_loop(group, static, act_order, use_cross):
    weight, x, x_full = _layer(4, n=160, tokens=600)
    x[7] = 0  # an input that is always zero
    h, d = _statistics(x, x_full)
    d = d if use_cross else None
    granularity = "channel" if group == -1 else "group"
    found = solve(
        weight,
        h,
        d,
        Grid(bits=3, granularity=granularity, group_size=group),
        alpha=0.25,
        damp=0.1,
        act_order=act_order,
        static_groups=static,
        residual="released",
    )
    expected = released_loop(weight, h, d, 3, group, static, act_order, 0.25)
    torch.testing.assert_close(found.weight, expected, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), act_order=st.booleans(), residual=st.sampled_from(["pre", "released"]))
def test_equal_streams_give_gptq(seed, act_order, residual):
    weight, x, _ = _layer(seed)
    h, d = _statistics(x, x)
    options = {"act_order": act_order, "residual": residual, "block_size": 8}
    found = solve(weight, h, d, GRIDS["channel"], alpha=1.0, **options)
    assert torch.equal(found.weight, solve(weight, h, None, GRIDS["channel"], **options).weight)
    torch.testing.assert_close(shifted_target(weight, h, d, 0.1), weight)


def test_without_a_grid_equal_streams_return_the_weight_bit_for_bit():
    weight, x, _ = _layer(5)
    x[3] = 0
    h, d = _statistics(x, x)
    found = solve(weight, h, d, None)
    assert torch.equal(found.weight, weight) and found.codes is None
    # a true 16-bit grid rounds, and later columns absorb that rounding
    fine = solve(weight, *_statistics(x + 1e-3, x + 1e-3), Grid(bits=16))
    assert float(((fine.weight - weight).abs() / fine.scale).max()) < 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_without_rounding_the_output_moves_towards_the_full_precision_one(seed, noise):
    weight, x, x_full = _layer(seed, noise)
    h, d = _statistics(x, x_full)
    before = _loss(weight, weight, x, x_full)
    assert before**0.5 <= 0.4
    gentle = _loss(solve(weight, h, d, None, alpha=0.25, damp=0.0).weight, weight, x, x_full)
    assert gentle < before
    exact = _loss(shifted_target(weight, h, d, 0.0), weight, x, x_full)
    assert exact <= gentle + 1e-12
    if before**0.5 <= 0.3:
        full = _loss(solve(weight, h, d, None, alpha=1.0, damp=0.0).weight, weight, x, x_full)
        assert exact - 1e-12 <= full < before


def test_full_correction_overshoots_when_the_streams_differ_much():
    ends = {}
    for noise in (0.2, 4.0):
        weight, x, _ = _layer(6)
        g = torch.Generator().manual_seed(1)
        drift = torch.randn(N, N, generator=g, dtype=torch.float64) / N**0.5
        x_full = x + noise * drift @ x
        h, d = _statistics(x, x_full)
        before = _loss(weight, weight, x, x_full)
        after = _loss(solve(weight, h, d, None, alpha=1.0, damp=0.0).weight, weight, x, x_full)
        ends[noise] = (before**0.5, after / before)
        # X̃ is a linear image of X, so the exact target loses nothing
        assert _loss(shifted_target(weight, h, d, 0.0), weight, x, x_full) < 1e-12
    assert ends[0.2][0] <= 0.3 and ends[0.2][1] < 1
    assert ends[4.0][0] > 0.9 and ends[4.0][1] > 1


def test_shift_is_exact_up_to_a_constant():
    weight, x, x_full = _layer(7)
    h, d = _statistics(x, x_full)
    target = shifted_target(weight, h, d, 0.0)
    gaps = []
    for seed in range(3):
        q = weight + 0.3 * torch.randn(NUM_OUT, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gaps.append(float((q @ x - weight @ x_full).square().sum() - ((q - target) @ x).square().sum()))
    assert max(gaps) - min(gaps) < 1e-8 * abs(gaps[0])


def test_permuting_the_inputs_permutes_the_answer():
    weight, x, x_full = _layer(8)
    h, d = _statistics(x, x_full)
    assert len(set(h.diagonal().tolist())) == N
    perm = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    grid = GRIDS["channel"]
    plain = solve(weight, h, d, grid)
    moved = solve(weight[:, perm], h[perm][:, perm], d[perm][:, perm], grid)
    torch.testing.assert_close(moved.weight, plain.weight[:, perm], rtol=1e-9, atol=1e-9)
    fixed = solve(weight, h, d, grid, act_order=False)
    assert not torch.allclose(fixed.weight, plain.weight)
    order = h.diagonal().argsort(descending=True)
    given_order = solve(weight[:, order], h[order][:, order], d[order][:, order], grid, act_order=False)
    torch.testing.assert_close(given_order.weight, plain.weight[:, order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use_cross", [True, False])
def test_dynamic_groups_in_act_order_come_with_their_order(use_cross):
    weight, x, x_full = _layer(9)
    h, d = _statistics(x, x_full)
    found = solve(weight, h, d if use_cross else None, GRIDS["group"], static_groups=False)
    assert found.perm is not None
    grid = GRIDS["group"]
    values = grid.value(found.codes[:, found.perm], found.scale, found.zero)
    torch.testing.assert_close(values, found.weight[:, found.perm], rtol=1e-12, atol=1e-12)
    for options in ({"act_order": False}, {"static_groups": True}):
        assert solve(weight, h, d, GRIDS["group"], **options).perm is None


def test_better_than_gptq_better_than_rounding():
    wins = []
    for seed in range(5):
        weight, x, x_full = _layer(seed, 0.4)
        h, d = _statistics(x, x_full)
        grid = Grid(bits=4, clip_search=True)
        rtn = _loss(round_to_nearest(weight, grid).weight, weight, x, x_full)
        gptq = _loss(solve(weight, h, None, grid).weight, weight, x, x_full)
        gptaq = _loss(solve(weight, h, d, grid).weight, weight, x, x_full)
        wins.append(gptaq < gptq and gptaq < rtn)
    assert all(wins)


def test_dead_inputs_lose_their_weights():
    weight, x, x_full = _layer(2)
    x[5] = 0
    h, d = _statistics(x, x_full)
    found = solve(weight, h, d, GRIDS["channel"])
    assert torch.equal(found.weight[:, 5], torch.zeros(NUM_OUT, dtype=torch.float64))
    hessian, shift = prepare(h, d)
    assert float(hessian[5, 5]) == 1 and float(shift[:, 5].abs().max()) == 0 and float(h[5, 5]) == 0


def test_damping_grows_until_the_factor_exists_and_says_so():
    x = torch.ones(4, 50) * torch.tensor([1.0, 1.0, 1.0, 2.0])[:, None]
    _, used = inverse_factor(x @ x.T, 0.0)
    assert used > 0
    with pytest.raises(VitkitError, match="NaN"):
        inverse_factor(torch.full((3, 3), torch.nan), 0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": torch.eye(3)}, "24 inputs"),
        ({"grid": Grid(granularity="tensor")}, "per 'channel'"),
        ({"grid": Grid(granularity="group", group_size=7)}, "group_size=7"),
        ({"damp": -1.0}, "damp"),
        ({"residual": "post"}, "residual"),
    ],
)
def test_misuse_says_what_is_allowed(change, message):
    weight, x, x_full = _layer()
    gram, cross = _statistics(x, x_full)
    with pytest.raises(BadInput, match=message):
        solve(**{"weight": weight, "gram": gram, "cross": cross, "grid": GRIDS["channel"], **change})


def test_shift_is_the_least_squares_answer_also_where_an_input_died():
    """An input that activation rounding sets to zero in X still carries the original network's output in X̃."""
    weight, x, x_full = _layer(7)
    x[5] = 0
    h, d = _statistics(x, x_full)
    target = shifted_target(weight, h, d, 0.0)
    best = torch.linalg.lstsq(x.T, (weight @ x_full).T, driver="gelsd").solution.T
    assert _loss(target, weight, x, x_full) == pytest.approx(_loss(best, weight, x, x_full), rel=1e-9)
    assert not target[:, 5].any()
