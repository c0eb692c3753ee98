from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitkit.train.mix import mix


def _batch(n: int = 6):
    return {"images": torch.rand(n, 3, 8, 8), "labels": torch.arange(n) % 3, "weights": torch.rand(n)}


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_labels_and_images_are_mixed_by_the_same_share(mixup, cutmix):
    batch = _batch()
    before = {k: v.clone() for k, v in batch.items()}
    targets = F.one_hot(batch["labels"], 3).float()
    out = mix(batch, targets, mixup, cutmix, seed=1, step=2)
    torch.testing.assert_close(out["labels"].sum(1), torch.ones(6))
    share = (out["weights"] - batch["weights"].roll(1)) / (batch["weights"] - batch["weights"].roll(1))
    lam = float(share[0])
    torch.testing.assert_close(share, torch.full((6,), lam), atol=1e-4, rtol=0)
    torch.testing.assert_close(out["labels"], lam * targets + (1 - lam) * targets.roll(1, 0), atol=1e-4, rtol=0)
    if not cutmix:
        images = batch["images"]
        torch.testing.assert_close(out["images"], lam * images + (1 - lam) * images.roll(1, 0), atol=1e-4, rtol=0)
    elif not mixup:
        kept = (out["images"] == batch["images"]).all(1).float().mean()
        assert float(kept) == pytest.approx(lam, abs=1e-4)
    assert all(torch.equal(before[k], batch[k]) for k in before)


def test_draws_are_a_function_of_seed_and_step_alone():
    batch, targets = _batch(), torch.eye(6)
    state = torch.get_rng_state()
    first = mix(batch, targets, 0.4, 1.0, seed=3, step=7)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    again = mix(batch, targets, 0.4, 1.0, seed=3, step=7)
    other = mix(batch, targets, 0.4, 1.0, seed=3, step=8)
    assert torch.equal(first["images"], again["images"]) and torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["images"], other["images"])


def test_off_or_alone_changes_nothing():
    batch = _batch()
    assert mix(batch, torch.eye(6), 0.0, 0.0, 0, 0) is batch
    one = {k: v[:1] for k, v in batch.items()}
    assert mix(one, torch.eye(1), 1.0, 0.0, 0, 0) is one
