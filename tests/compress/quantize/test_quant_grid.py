from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.compress.quantize.grid import Grid, pack, unpack
from vitkit.errors import BadInput

GRANULARITIES = ["tensor", "channel", "group", "token"]


def _grid(bits: int, symmetric: bool, granularity: str, **options) -> Grid:
    group = 4 if granularity == "group" else -1
    return Grid(bits=bits, symmetric=symmetric, granularity=granularity, group_size=group, **options)


def _data(seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(6, 16, generator=generator, dtype=torch.float64)


def _wide(grid: Grid, step: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    step = step.repeat_interleave(grid.group_size, -1) if grid.granularity == "group" else step
    return step.expand_as(like)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    granularity=st.sampled_from(GRANULARITIES),
    clip=st.booleans(),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
)
def test_error_is_half_a_step_inside_the_range_and_zero_is_exact(
    bits, symmetric, granularity, clip, seed, scale, shift
):
    grid = _grid(bits, symmetric, granularity, clip_search=clip)
    x = _data(seed, scale) + shift * scale
    s, z = grid.fit(x)
    x_hat = grid(x, s, z)
    low, high = _wide(grid, s * (grid.q_min - z), x), _wide(grid, s * (grid.q_max - z), x)
    inside = (x >= low) & (x <= high)
    assert inside.any()
    half = _wide(grid, s, x) / 2
    assert ((x_hat - x).abs() <= half * (1 + 1e-9))[inside].all()
    assert (x_hat >= low - 1e-12).all() and (x_hat <= high + 1e-12).all()
    assert (z >= grid.q_min).all() and (z <= grid.q_max).all() and torch.equal(z, z.round())
    assert torch.equal(grid(torch.zeros_like(x), s, z), torch.zeros_like(x))
    # without clipping only rounding z moves the ends of the range, by at most half a step
    if not clip:
        assert ((x - high).clamp(min=0) <= half * (1 + 1e-9)).all()
        assert ((low - x).clamp(min=0) <= half * (1 + 1e-9)).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_idempotent_with_a_fixed_step(bits, symmetric, granularity):
    grid = _grid(bits, symmetric, granularity, clip_search=bits < 8)
    x = _data(3)
    s, z = grid.fit(x)
    once = grid(x, s, z)
    assert torch.equal(grid(once, s, z), once)
    codes = grid.code(x, s, z)
    assert torch.equal(codes, codes.round()) and codes.min() >= grid.q_min and codes.max() <= grid.q_max
    assert torch.equal(grid.value(codes, s, z), once)


def test_formula_by_hand():
    x = torch.tensor([[-0.5, 0.25, 1.0]])
    s, z = Grid(bits=2).fit(x)
    assert (float(s), float(z)) == (0.5, 1.0)
    assert Grid(bits=2).code(x, s, z).tolist() == [[0.0, 1.0, 3.0]]
    s, z = Grid(bits=3, symmetric=True).fit(x)
    assert math.isclose(float(s), 1 / 3, rel_tol=1e-6) and float(z) == 0
    # the negative end has one level more than the positive one
    assert Grid(bits=3, symmetric=True).code(torch.tensor([[-9.0, 9.0]]), s, z).tolist() == [[-4.0, 3.0]]


def test_ranges_that_are_empty_or_tiny():
    grid = Grid(bits=4)
    s, _ = grid.fit(torch.zeros(2, 5))
    assert torch.allclose(s, torch.full((2, 1), 2 / 15)) and torch.equal(grid(torch.zeros(2, 5)), torch.zeros(2, 5))
    s, _ = grid.fit(torch.full((1, 3), 1e-9))
    assert math.isclose(float(s), 1e-5 / 15, rel_tol=1e-5)
    assert torch.equal(grid(torch.full((1, 3), 5.0)), torch.full((1, 3), 5.0))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_clipping_search_never_hurts_and_matches_a_slow_search(symmetric, granularity, norm):
    x = _data(5)
    x[0, 0] = 12.0  # an outlier, so that clipping pays
    grid = _grid(3, symmetric, granularity, clip_search=True, clip_norm=norm)
    plain = _grid(3, symmetric, granularity)
    rows = {"tensor": x.reshape(1, -1), "group": x.reshape(-1, 4)}.get(granularity, x)
    found = (grid(x) - x).abs().pow(norm).reshape(rows.shape).sum(-1)
    start = (plain(x) - x).abs().pow(norm).reshape(rows.shape).sum(-1)
    assert (found <= start).all() and (found < start).any()
    for row, error in zip(rows, found):
        low, high = min(0.0, float(row.min())), max(0.0, float(row.max()))
        if symmetric:
            high = max(high, -low)
            low = -high
        best = math.inf
        for i in range(80):
            p = 1 - i / 100
            s = p * high / 3 if symmetric else p * (high - low) / 7
            z = 0 if symmetric else round(-p * low / s)
            code = (torch.round(row / s) + z).clamp(-4 if symmetric else 0, 3 if symmetric else 7)
            best = min(best, float((s * (code - z) - row).abs().pow(norm).sum()))
        assert math.isclose(best, float(error), rel_tol=1e-9)


def test_every_row_is_fitted_alone():
    x = _data(1)
    grid = Grid(bits=4, granularity="token", clip_search=True)
    together = grid(x)
    assert all(torch.equal(together[i : i + 1], grid(x[i : i + 1])) for i in range(len(x)))
    stacked = grid(x.reshape(2, 3, 16))
    assert torch.equal(stacked.reshape(6, 16), together)


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(2, 8), rows=st.integers(1, 4), length=st.integers(1, 37), seed=st.integers(0, 999))
def test_packing_is_lossless_and_without_gaps(bits, rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, length), generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, math.ceil(length * bits / 8))
    assert torch.equal(unpack(packed, bits, length).long(), codes)


def test_misuse_says_what_is_allowed():
    with pytest.raises(BadInput, match="2 to 16"):
        Grid(bits=1)
    with pytest.raises(BadInput, match="granularity"):
        Grid(granularity="row")
    with pytest.raises(BadInput, match="number of entries"):
        Grid(granularity="group")
    with pytest.raises(BadInput, match=r"pick one of \[1, 2, 3, 6\]"):
        Grid(granularity="group", group_size=4).fit(torch.zeros(2, 6))
    with pytest.raises(BadInput, match="do not fit 2 bits"):
        pack(torch.tensor([4]), 2)
    with pytest.raises(BadInput, match="take 1 bytes"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, 2)
    with pytest.raises(BadInput, match="packed"):
        pack(torch.tensor([1]), 9)
