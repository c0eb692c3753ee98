"""The QR normalizer: exact double stochasticity, the right gradient, bounded near rank one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.errors import BadInput
from vitkit.models.diagnostics import dsm_error
from vitkit.models.parts.normalizers.qr import QROrthostochastic
from vitkit.models.swap import swap
from vitkit.models.vit import ViT


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 20), spread=st.sampled_from([0.0, 1e-3, 1.0, 50.0]), seed=st.integers(0, 99))
def test_is_doubly_stochastic_and_not_negative(n: int, spread: float, seed: int) -> None:
    scores = torch.randn(2, 2, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread
    weights = QROrthostochastic()(scores)
    error = dsm_error(weights)
    assert error.rows.max() < 1e-6 and error.columns.max() < 1e-6 and weights.min() >= 0


def gram_schmidt(a: torch.Tensor) -> torch.Tensor:
    columns: list[torch.Tensor] = []
    for column in a.T:
        for other in columns:
            column = column - other * (other @ column)
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def test_equals_gram_schmidt() -> None:
    scores = torch.randn(6, 6, dtype=torch.float64)
    expected = gram_schmidt(scores + 1e-4 * torch.eye(6, dtype=torch.float64)).square()
    torch.testing.assert_close(QROrthostochastic()(scores[None, None])[0, 0], expected, rtol=1e-8, atol=1e-8)


def test_zero_scores_give_the_identity_without_gradient() -> None:
    scores = torch.zeros(1, 2, 4, 4, requires_grad=True)
    weights = QROrthostochastic()(scores)
    torch.testing.assert_close(weights, torch.eye(4).expand(1, 2, 4, 4))
    (weights * torch.randn(1, 2, 4, 4)).sum().backward()
    assert scores.grad.abs().max() == 0


def test_gradient_and_second_derivative() -> None:
    scores = torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scores.requires_grad_()
    part = QROrthostochastic(max_gain=None)
    assert torch.autograd.gradcheck(part, scores)
    assert torch.autograd.gradgradcheck(part, scores)


def test_gradient_near_rank_one_is_bounded_and_keeps_its_direction() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 1, 8, 1) @ torch.randn(4, 1, 1, 8) + 1e-3 * torch.randn(4, 1, 8, 8)
    scores.requires_grad_()
    upstream = torch.randn(4, 1, 8, 8)
    (free,) = torch.autograd.grad((QROrthostochastic(max_gain=None)(scores) * upstream).sum(), scores)
    (bounded,) = torch.autograd.grad((QROrthostochastic(max_gain=10.0)(scores) * upstream).sum(), scores)
    norm, limit = torch.linalg.matrix_norm(bounded), 10 * torch.linalg.matrix_norm(upstream)
    assert (torch.linalg.matrix_norm(free) > 1000).any()
    assert (norm <= limit * 1.001).all()
    cosine = torch.cosine_similarity(free.flatten(1), bounded.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(4), rtol=1e-4, atol=1e-4)


def test_exactly_singular_scores_keep_a_finite_gradient() -> None:
    scores = (-1e-4 * torch.eye(4) + torch.ones(4, 4)).expand(1, 1, 4, 4).clone().requires_grad_()
    (QROrthostochastic()(scores) * torch.arange(16.0).view(4, 4)).sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_refuses_a_mask_and_impossible_options() -> None:
    with pytest.raises(BadInput, match="sinkhorn"):
        QROrthostochastic()(torch.randn(1, 1, 3, 3), torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(BadInput, match="ridge"):
        QROrthostochastic(ridge=-1.0)
    with pytest.raises(BadInput, match="max_gain"):
        QROrthostochastic(max_gain=0.0)


def test_runs_in_a_host_compiled_and_in_half_precision() -> None:
    torch.manual_seed(0)
    model = ViT(img_size=(10, 14), patch_size=2, in_chans=2, num_classes=4, embed_dim=16, depth=2, num_heads=2)
    swap(model, "normalizer", QROrthostochastic)
    images = torch.rand(2, 2, 10, 14)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-3, atol=1e-4)
    model(images).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).isfinite().all()


def test_scores_that_forbid_a_key_are_refused() -> None:
    scores = torch.randn(1, 1, 3, 3)
    scores[..., 0, 2] = -torch.inf
    with pytest.raises(BadInput, match="-inf.*sinkhorn"):
        QROrthostochastic()(scores)
    model = ViT(img_size=8, patch_size=2, in_chans=1, num_classes=4, embed_dim=16, depth=1, num_heads=2)
    swap(model, "normalizer", QROrthostochastic)
    for masks in ({"is_causal": True}, {"attn_mask": torch.eye(17, dtype=torch.bool)}):
        with pytest.raises(BadInput, match="-inf"):
            model(torch.rand(2, 1, 8, 8), **masks)
    # large, but a score all the same
    assert QROrthostochastic()(torch.full((1, 1, 3, 3), -1e4)).isfinite().all()
