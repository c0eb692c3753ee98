"""Softmax on scores of unit spread."""

from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.parts.normalizers.normsoftmax import NormSoftmax


def test_is_softmax_of_standardised_scores() -> None:
    scores = torch.randn(2, 3, 5, 5, dtype=torch.float64) * 7 + 2
    expected = torch.stack(
        [(m / m.std(correction=0)).softmax(-1) for m in scores.flatten(0, 1)]  # one matrix at a time
    ).reshape_as(scores)
    torch.testing.assert_close(NormSoftmax()(scores), expected)


def test_scale_and_offset_of_the_scores_do_not_matter() -> None:
    scores = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(NormSoftmax()(scores * 0.01 - 5), NormSoftmax()(scores))


def test_equal_scores_give_uniform_attention() -> None:
    torch.testing.assert_close(NormSoftmax()(torch.full((1, 1, 4, 4), 3.3)), torch.full((1, 1, 4, 4), 0.25))


def test_spread_is_a_constant_in_the_backward_pass() -> None:
    scores = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad((NormSoftmax()(scores) * target).sum(), scores)
    sd = scores.detach().std(correction=0)
    (expected,) = torch.autograd.grad(((scores / sd).softmax(-1) * target).sum(), scores)
    torch.testing.assert_close(grad, expected)


def test_masked_tokens_change_nothing_for_the_others() -> None:
    scores = torch.randn(1, 2, 6, 6)
    valid = torch.tensor([[True] * 4 + [False] * 2])
    square = valid[:, None, :, None] & valid[:, None, None, :]
    padded = NormSoftmax()(scores, square)
    torch.testing.assert_close(padded[..., :4, :4], NormSoftmax()(scores[..., :4, :4]))
    assert padded[..., 4:, :].eq(0).all() and padded[..., 4:].eq(0).all()


def test_a_graph_knows_no_values_and_agrees() -> None:
    scores = torch.randn(2, 3, 5, 5) * 7 + 2
    compiled = torch.compile(NormSoftmax(), backend="eager", fullgraph=True)
    for example in (scores, scores.masked_fill(scores < 0, -torch.inf)):
        torch.testing.assert_close(compiled(example), NormSoftmax()(example))


def test_a_broken_model_is_seen_and_an_empty_batch_stays_empty() -> None:
    assert NormSoftmax()(torch.full((1, 1, 2, 2), torch.nan)).isnan().all()
    assert NormSoftmax()(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_eps_must_be_positive() -> None:
    with pytest.raises(BadInput, match="eps=0"):
        NormSoftmax(eps=0)


def test_it_maps_over_a_batch() -> None:
    scores = torch.randn(3, 1, 2, 4, 4)
    torch.testing.assert_close(torch.vmap(NormSoftmax())(scores), torch.stack([NormSoftmax()(s) for s in scores]))
