from __future__ import annotations

import pytest
import torch

from vitkit import swap
from vitkit.models.build import build
from vitkit.models.diagnostics.condition import condition, log_condition


def test_log_condition_is_numpys():
    x = torch.randn(4, 9, 5, dtype=torch.float64)
    values, counted = log_condition(x)
    torch.testing.assert_close(values, torch.linalg.cond(x).log())
    assert (counted == 5).all()


def test_rank_deficient_matrices_count_their_real_values():
    x = torch.randn(9, 3, dtype=torch.float64) @ torch.randn(3, 6, dtype=torch.float64)
    value, counted = log_condition(x)
    assert counted == 3
    assert value < 10
    assert log_condition(torch.zeros(3, 3))[0].isnan()


def test_linear_attention_obeys_the_cubic_bound():
    """κ(X W_Q W_Kᵀ Xᵀ X W_V) ≤ κ(W_Q W_Kᵀ) κ(W_V) κ(X)³ for N ≥ D and X of full column rank."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
        wq, wk, wv = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
        # the output has rank 6; its smallest non-zero singular value counts
        out = torch.linalg.svdvals(x @ wq @ wk.T @ x.T @ x @ wv)
        bound = torch.linalg.cond(wq @ wk.T) * torch.linalg.cond(wv) * torch.linalg.cond(x) ** 3
        assert out[0] / out[5] <= bound * (1 + 1e-6)


def test_rows_follow_the_skips_and_the_model_is_left_alone():
    model = build("vit_femto", img_size=16, in_chans=1, num_classes=3).train()
    images = torch.rand(4, 1, 16, 16)
    rows = condition(model, images)
    assert [r.place for r in rows[:5]] == ["input", "attn", "attn + skip", "mlp", "mlp + skip"]
    assert model.training
    swap(model, "block", "skip-policy", attn=False)
    assert "attn + skip" not in {r.place for r in condition(model, images)}


@pytest.mark.parametrize("scale", [0.1])
def test_a_small_branch_beside_the_skip_is_better_conditioned(scale):
    """Measured, not a theorem: κ(XM + X) is far below κ(XM) when M is small against the identity."""
    x = torch.randn(20, 16, 12, dtype=torch.float64)
    m = scale * torch.randn(20, 12, 12, dtype=torch.float64) / 12**0.5
    assert (torch.linalg.cond(x @ m + x) < torch.linalg.cond(x @ m)).double().mean() > 0.95
