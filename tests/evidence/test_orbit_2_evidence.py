"""The downscaling experiment runs at toy size, and its fields are what they say."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from vitkit.evidence import orbit_2


def test_runs_at_toy_size(monkeypatch):
    for name, value in (("NUM_TRAIN", 8), ("NUM_TEST", 3), ("NUM_LARGE", 2), ("EPOCHS", 1), ("LARGE", 8)):
        monkeypatch.setattr(orbit_2, name, value)
    steps = []
    found = orbit_2.run(seeds=(0,), progress=lambda what, done, total: steps.append((done, total)))
    assert found.shown in (True, False, None) and len(found.rows) == 4 + 5
    assert steps == [(i, 4) for i in range(4)]
    assert found.rows[1]["weights"] < found.rows[2]["weights"]


def test_fields_are_seeded_coarse_means_and_not_trivial():
    x, y = orbit_2.fields(3, 8, 1)
    assert x.shape == (3, 5, 8, 8) and y.shape == (3, 2, 32, 32)
    torch.testing.assert_close(F.avg_pool2d(y, 4), x[:, :2])
    assert torch.equal(orbit_2.fields(3, 8, 1)[0], x) and not torch.equal(orbit_2.fields(3, 8, 2)[0], x)
    assert float(y.std((0, 2, 3)).min()) > 0.2 and float(y.std((0, 2, 3)).max()) < 3
    assert 0.2 < float((y[:, 1] == 0).float().mean()) < 0.8
