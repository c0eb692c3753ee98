"""The competition ends where its mathematics says: conditions of the LASSO, limits, gradients, no waiting."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.lca import check_eta, lca, optimality_gap, stable_eta, threshold, update_dictionary


def problem(dim=24, atoms=40, batch=6, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    dictionary = F.normalize(torch.randn(atoms, dim, generator=rng, dtype=dtype) + 0.2, dim=1)
    return torch.randn(batch, dim, generator=rng, dtype=dtype) * 3, dictionary


def test_the_fixed_point_satisfies_the_conditions_of_the_nonnegative_lasso():
    s, phi = problem()
    lam = 0.4
    found = lca(s, phi, lam, max_steps=50_000, tol=1e-8)
    assert found.converged.all() and (found.codes >= 0).all()
    rest = s @ phi.T - found.codes @ (phi @ phi.T)
    on = found.codes > 0
    assert on.any() and (~on).any()
    assert (rest[on] - lam).abs().max() < 1e-4 and (rest[~on] - lam).max() < 1e-4
    assert optimality_gap(s, phi, found.codes, lam, "positive").max() < 1e-4
    assert optimality_gap(s, phi, found.codes * 1.1, lam, "positive").min() > 1e-2


@pytest.mark.parametrize("positive", [True, False])
def test_it_is_scikit_learns_lasso(positive):
    from sklearn.linear_model import Lasso

    s, phi = problem(batch=3)
    found = lca(s, phi, 0.5, "positive" if positive else "two-sided", max_steps=50_000, tol=1e-9).codes
    for signal, code in zip(s.numpy(), found.numpy()):
        lasso = Lasso(alpha=0.5 / 24, positive=positive, fit_intercept=False, tol=1e-12, max_iter=200_000)
        assert np.allclose(lasso.fit(phi.T.numpy(), signal).coef_, code, atol=1e-4)


def test_without_threshold_and_with_orthonormal_atoms_it_is_the_rectified_projection():
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    s = problem(dim=12)[0]
    assert torch.allclose(lca(s, basis, 0.0, tol=1e-9).codes, (s @ basis.T).clamp(min=0), atol=1e-6)


def test_the_sum_falls_with_lambda_to_zero():
    s, phi = problem()
    top = (s @ phi.T).amax(1)
    sums = [lca(s, phi, share * top, max_steps=20_000).codes.sum(1) for share in (0.05, 0.2, 0.5, 0.9)]
    assert all((a >= b - 1e-4).all() and (a > b).any() for a, b in pairwise(sums))
    assert (lca(s, phi, top).codes == 0).all() and (lca(s, phi, 1.5 * top).codes == 0).all()


def test_a_signal_that_is_an_atom_activates_it_most():
    _, phi = problem()
    found = lca(4 * phi, phi, 0.5, max_steps=20_000).codes
    assert torch.equal(found.argmax(1), torch.arange(len(phi)))


@pytest.mark.parametrize("kind", ["positive", "two-sided", "hard"])
@pytest.mark.parametrize("steps", [None, 30])
def test_a_batch_is_its_signals_one_by_one(kind, steps):
    s, phi = problem()
    s = s * torch.tensor([0.2, 1, 1, 5, 1, 20]).view(-1, 1)
    batch = lca(s, phi, 0.5, kind, steps=steps)
    assert steps is not None or len(set(batch.steps.tolist())) > 1
    for i in range(len(s)):
        one = lca(s[i : i + 1], phi, 0.5, kind, steps=steps)
        assert torch.allclose(one.codes[0], batch.codes[i], atol=1e-10)
        assert (one.steps[0], one.active_steps[0]) == (batch.steps[i], batch.active_steps[i])


def test_steps_follow_the_dynamics():
    s, phi = problem(batch=2)
    found = lca(s, phi, 0.3, eta=0.01, steps=50)
    for signal, code, active in zip(s, found.codes, found.active_steps):
        u, total = torch.zeros(len(phi), dtype=s.dtype), 0
        b, inhibition = phi @ signal, phi @ phi.T - torch.eye(len(phi), dtype=s.dtype)
        for _ in range(50):
            u = u + 0.01 * (b - inhibition @ (u - 0.3).clamp(min=0) - u)
            total += int((u > 0.3).sum())
        assert torch.allclose(code, (u - 0.3).clamp(min=0), atol=1e-12) and int(active) == total
    # half a time constant is far from the end
    assert optimality_gap(s, phi, found.codes, 0.3, "positive").min() > 0.05
    assert not found.converged.any()


def test_thresholds():
    u, lam = torch.tensor([-3.0, -0.5, 0.5, 3.0]), torch.tensor(1.0)
    assert threshold(u, lam, "positive").tolist() == [0, 0, 0, 2]
    assert threshold(u, lam, "two-sided").tolist() == [-2, 0, 0, 2]
    assert threshold(u, lam, "hard").tolist() == [-3, 0, 0, 3]


@pytest.mark.parametrize("kind", ["positive", "two-sided"])
def test_gradients_of_the_fixed_point_are_those_of_finite_differences(kind):
    s, phi = problem(batch=2)
    weights = torch.randn(2, len(phi), generator=torch.Generator().manual_seed(3), dtype=s.dtype)

    def value(signal):
        lam = 0.2 * (signal @ phi.T).abs().amax(1)
        return (lca(signal, phi, lam, kind, max_steps=100_000, tol=1e-12).codes * weights).sum()

    s.requires_grad_()
    (gradient,) = torch.autograd.grad(value(s), s)
    with torch.no_grad():
        for place in ((0, 0), (0, 7), (1, 3)):
            step = torch.zeros_like(s)
            step[place] = 1e-5
            assert float((value(s + step) - value(s - step)) / 2e-5) == pytest.approx(float(gradient[place]), abs=1e-4)


def test_gradients_go_through_given_steps():
    s, phi = problem(batch=2)
    s = s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lca(x, phi, 0.31, steps=8, eta=0.1).codes, s)


def test_an_unstable_step_is_warned_of():
    s, phi = problem()
    largest = float(torch.linalg.eigvalsh(phi @ phi.T)[-1])
    assert stable_eta(phi) == pytest.approx(min(0.1, 1 / largest))
    with pytest.warns(UserWarning, match="may diverge"):
        lca(s, phi, 0.1, eta=2.1 / largest, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_eta(phi, 1.9 / largest)


def test_float32_comes_to_rest_too():
    s, phi = problem(dtype=torch.float32)
    found = lca(s, phi, 0.5)
    assert found.converged.all() and optimality_gap(s, phi, found.codes, 0.5, "positive").max() < 1e-3


def test_learning_lowers_the_error_and_keeps_lengths():
    s, phi = problem(batch=64)
    errors = []
    for _ in range(15):
        codes = lca(s, phi, 0.3).codes
        errors.append(float((s - codes @ phi).square().sum()))
        phi = update_dictionary(phi, s, codes, 0.2)
    assert errors[-1] < 0.9 * errors[0]
    assert torch.allclose(phi.norm(dim=1), torch.ones(len(phi), dtype=phi.dtype))


def test_errors_name_what_is_wrong():
    s, phi = problem()
    with pytest.raises(BadInput, match=r"\(6, 24\) and \(40, 20\)"):
        lca(s, phi[:, :20], 0.1)
    with pytest.raises(BadInput, match="soft"):
        lca(s, phi, 0.1, "soft")
    with pytest.raises(BadInput, match="lam must be at least 0"):
        lca(s, phi, -1.0)
    with pytest.raises(BadInput, match="for each of the 6"):
        lca(s, phi, torch.ones(5))
    with pytest.raises(BadInput, match="steps=0"):
        lca(s, phi, 0.1, steps=0)
