from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitkit.errors import BadInput
from vitkit.train.optimizers import SAM, ZSharp
from vitkit.train.optimizers.zsharp import quantile, z_filter


def _setup(seed=0, **options):
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.randn(*shape)) for shape in [(7, 9), (9,), (3, 4, 5), (1, 6, 8)]]
    for p in params:
        p.grad = torch.randn_like(p)
    opt = ZSharp(params, base=torch.optim.SGD, lr=0.1, **options)
    return params, opt, opt.perturbation([(p, opt.param_groups[0]) for p in params])


@given(seed=st.integers(0, 50), percentile=st.floats(0.05, 0.99))
def test_the_filter_is_the_equation(seed, percentile):
    g = torch.randn(6, 11, generator=torch.Generator().manual_seed(seed))
    z = ((g - g.mean()) / (g.std() + 1e-12)).abs()
    ordered = z.flatten().sort().values
    rank = percentile * (len(ordered) - 1)
    low = math.floor(rank)
    tau = ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (rank - low)
    torch.testing.assert_close(z_filter(g, percentile), torch.where(z > tau, g, 0.0))


@given(seed=st.integers(0, 50), percentile=st.floats(0.01, 0.99), rows=st.integers(2, 20), columns=st.integers(2, 20))
def test_the_kept_share_is_one_minus_p_within_one_entry(seed, percentile, rows, columns):
    g = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()
    kept = float((z_filter(g, percentile) != 0).double().mean())
    assert abs(kept - (1 - percentile)) <= 1 / g.numel() + 1e-9


@given(seed=st.integers(0, 50), q=st.floats(0, 1), n=st.integers(1, 200), tied=st.booleans())
def test_quantile_is_torchs(seed, q, n, tied):
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed)).double()
    values = values.round() if tied else values
    torch.testing.assert_close(quantile(values, q), values.quantile(q))


def test_tensors_of_more_than_sixteen_million_entries():
    n = 2**24 + 3
    values = torch.arange(n, dtype=torch.float32)
    # float32 holds every whole number up to 2**24, so the answer is exact to a few units
    assert float(quantile(values.flip(0), 0.95)) == pytest.approx(0.95 * (n - 1), abs=4)


def test_layer_norm_gives_every_matrix_length_rho_and_vectors_sams():
    params, _, moves = _setup(rho=0.3, percentile=0.8, norm="layer")
    whole = torch.cat([p.grad.flatten() for p in params]).norm()
    for p, move in zip(params, moves):
        if p.ndim > 1:
            assert float(move.norm()) == pytest.approx(0.3, abs=1e-6)
            kept = move != 0
            torch.testing.assert_close(move[kept] / move.norm(), p.grad[kept] / p.grad[kept].norm())
        else:
            torch.testing.assert_close(move, 0.3 * p.grad / whole)
            assert float(move.norm()) < 0.3


def test_global_norm_gives_all_together_length_rho():
    params, _, moves = _setup(rho=0.3, percentile=0.8, norm="global")
    assert float(torch.cat([m.flatten() for m in moves]).norm()) == pytest.approx(0.3, abs=1e-6)
    assert all((m == 0).any() for m, p in zip(moves, params) if p.ndim > 1)


def test_percentile_zero_with_global_norm_is_sam():
    def run(rule, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
        opt = rule(model.parameters(), lr=0.05, rho=0.2, **options)
        x, y = torch.randn(9, 5), torch.arange(9) % 2

        def closure():
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(5):
            opt.step(closure)
        return list(model.parameters())

    for a, b in zip(run(SAM), run(ZSharp, percentile=0.0, norm="global")):
        assert torch.equal(a, b)


def test_percentile_zero_keeps_the_smallest_entry():
    g = torch.tensor([[1.0, 2.0], [3.0, 9.0]])
    assert torch.equal(z_filter(g, 0.0), g)


@pytest.mark.parametrize("norm", ["layer", "global"])
def test_ties_that_empty_the_mask_fall_back_to_the_plain_direction(norm):
    tied, other = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(5, 5))
    # half +1, half −1: every |z| is the same, nothing is above the quantile
    tied.grad = torch.tensor([1.0, -1.0]).repeat(8).view(4, 4)
    other.grad = torch.randn(5, 5)
    opt = ZSharp([tied, other], base=torch.optim.SGD, lr=0.1, rho=0.2, percentile=0.9, norm=norm)
    assert z_filter(tied.grad, 0.9) is None
    first, second = opt.perturbation([(p, opt.param_groups[0]) for p in (tied, other)])
    filtered = z_filter(other.grad, 0.9)
    whole = torch.cat([tied.grad.flatten(), (other.grad if norm == "layer" else filtered).flatten()]).norm()
    torch.testing.assert_close(first, 0.2 * tied.grad / whole)
    length = filtered.norm() if norm == "layer" else whole
    torch.testing.assert_close(second, 0.2 * filtered / length)


def test_tensors_without_a_spread_are_not_filtered():
    assert z_filter(torch.randn(5), 0.9) is None
    assert z_filter(torch.randn(1, 1), 0.9) is None
    assert z_filter(torch.zeros(3, 3), 0.9) is None


def test_raw_gradients_survive_not_z_scores():
    g = torch.tensor([[0.0, 0.1, 0.0], [0.0, 0.0, 5.0]])
    kept = z_filter(g, 0.8)
    assert kept[1, 2] == 5.0 and int((kept != 0).sum()) == 1


def test_impossible_options_are_named():
    p = [nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(BadInput, match=r"percentile=1\.0"):
        ZSharp(p, percentile=1.0, lr=0.1)
    with pytest.raises(BadInput, match="'tensor'"):
        ZSharp(p, norm="tensor", lr=0.1)
