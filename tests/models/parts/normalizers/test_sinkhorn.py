"""Sinkhorn's promises: exact rows, columns that only get better, the valid tokens alone under a mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.errors import BadInput
from vitkit.models.diagnostics import dsm_error
from vitkit.models.parts.normalizers.sinkhorn import Sinkhorn
from vitkit.models.swap import swap
from vitkit.models.vit import ViT


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 12), spread=st.sampled_from([0.1, 1.0, 4.0, 30.0]), seed=st.integers(0, 99))
def test_rows_are_exact_and_the_column_error_never_rises(n: int, spread: float, seed: int) -> None:
    scores = torch.randn(2, 2, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread
    errors = []
    for steps in range(1, 23, 2):
        error = dsm_error(Sinkhorn(steps)(scores))
        assert error.rows.max() < 1e-10
        errors.append(error.columns)
    assert (torch.stack(errors).diff(dim=0) < 1e-9).all()


def test_equals_plain_alternating_division() -> None:
    scores = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = (scores / 0.7).exp()
    for step in range(7):
        expected = expected / expected.sum(-1 if step % 2 == 0 else -2, keepdim=True)
    torch.testing.assert_close(Sinkhorn(steps=7, tau=0.7)(scores), expected)


def test_one_step_is_softmax() -> None:
    scores = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(Sinkhorn(steps=1)(scores), scores.softmax(-1))


def test_wide_scores_converge_slowly_as_documented() -> None:
    scores = 4 * torch.randn(64, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert dsm_error(Sinkhorn(3)(scores)).columns.mean() > 1
    assert 0.02 < dsm_error(Sinkhorn(21)(scores)).columns.mean() < 0.5


def test_mask_restricts_rows_and_columns_to_the_valid_tokens() -> None:
    scores = torch.randn(2, 2, 6, 6, requires_grad=True)
    valid = torch.tensor([[True, True, False, True, True, False], [False] * 6])
    square = valid[:, None, :, None] & valid[:, None, None, :]
    weights = Sinkhorn(31)(scores, square)
    assert weights.masked_select(~square.expand_as(weights)).eq(0).all()
    error = dsm_error(weights, valid[:, None])
    assert error.rows.max() < 1e-5 and error.columns.max() < 1e-4
    keep = valid[0].nonzero()[:, 0]
    torch.testing.assert_close(
        weights[0][:, keep][:, :, keep], Sinkhorn(31)(scores[:1, :, keep][..., keep])[0], rtol=1e-4, atol=1e-6
    )
    weights.square().sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_gradient() -> None:
    scores = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Sinkhorn(5), scores)


def test_half_precision_is_computed_in_float32() -> None:
    scores = (torch.randn(2, 2, 9, 9) * 3).bfloat16()
    weights = Sinkhorn(21)(scores)
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(weights, Sinkhorn(21)(scores.float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"steps": 2}, {"steps": 0}, {"tau": 0.0}])
def test_refuses_impossible_options(options: dict) -> None:
    with pytest.raises(BadInput, match=next(iter(options))):
        Sinkhorn(**options)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_runs_in_a_host_with_merged_and_padded_tokens(prefix: int) -> None:
    model = ViT(
        img_size=(10, 14),
        patch_size=2,
        in_chans=3,
        num_classes=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        class_token=prefix > 0,
        global_pool="token" if prefix else "avg",
        reg_tokens=max(0, prefix - 1),
    )
    swap(model, "normalizer", Sinkhorn, steps=5)
    assert model(torch.rand(2, 3, 10, 14)).isfinite().all()
    x, layout = model.embed(torch.rand(2, 3, 10, 14))
    layout = layout.replace(valid=torch.rand(2, 35) > 0.5)
    assert model.readout(*model.run(x, layout)).isfinite().all()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = torch.rand(2, 3, 10, 14)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


def test_forbidden_scores_stay_at_zero() -> None:
    scores = torch.randn(2, 1, 5, 5, requires_grad=True)
    # a ring and its diagonal: many doubly stochastic matrices are zero elsewhere
    ring = torch.eye(5, dtype=torch.bool) | torch.eye(5, dtype=torch.bool).roll(1, 0)
    weights = Sinkhorn(201)(scores.masked_fill(~ring, -torch.inf))
    assert weights[:, :, ~ring].eq(0).all()
    error = dsm_error(weights)
    assert error.rows.max() < 1e-5 and error.columns.max() < 1e-3
    weights.square().sum().backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("steps", [1, 3, 21])
def test_a_key_forbidden_to_all_queries_is_left_out(steps: int) -> None:
    scores = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    gone = torch.zeros(5, dtype=torch.bool)
    gone[2] = True
    weights = Sinkhorn(steps)(scores.masked_fill(gone, -torch.inf))
    assert weights[..., 2].eq(0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))
    # the others share as if the key were not there
    torch.testing.assert_close(weights[..., ~gone], Sinkhorn(steps)(scores[..., ~gone]))
    weights.square().sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_scores_far_apart_do_not_underflow() -> None:
    # the second key is 300 below the first for every query; a column step lifts it all the same
    scores = torch.tensor([[0.0, -300.0], [1.0, -302.0]])[None, None]
    expected = Sinkhorn(3)(scores.double()).float()
    torch.testing.assert_close(Sinkhorn(3)(scores), expected)
    assert expected[0, 0, 0, 1] > 0.5


def test_log_sizes_of_merged_tokens_have_no_effect_in_the_limit() -> None:
    scores = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    sized = scores + torch.tensor([1.0, 2.0, 1.0, 4.0, 1.0, 1.0], dtype=torch.float64).log()
    torch.testing.assert_close(Sinkhorn(301)(sized), Sinkhorn(301)(scores))
    assert not torch.allclose(Sinkhorn(1)(sized), Sinkhorn(1)(scores))
