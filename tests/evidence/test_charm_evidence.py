from __future__ import annotations

import torch

from vitkit.evidence import charm


def test_runs_at_toy_size_and_reports_every_arm(monkeypatch):
    monkeypatch.setattr(charm, "NUM_TRAIN", 32)
    monkeypatch.setattr(charm, "NUM_TEST", 16)
    monkeypatch.setattr(charm, "EPOCHS", 1)
    found = charm.run(seeds=(0, 1))
    assert [row["tokens"] for row in found.rows] == list(charm.ARMS)
    assert found.shown in (True, False, None)


def test_photos_are_degraded_as_strongly_as_the_target_says():
    images, strength = charm.degraded_photos(40, seed=0, test=False)
    assert images.shape == (40, 3, 96, 160)
    assert 0 <= images.min() <= images.max() <= 1
    again, _ = charm.degraded_photos(40, seed=0, test=False)
    other, _ = charm.degraded_photos(40, seed=0, test=True)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    # detail finer than two pixels comes with noise
    rough = images.diff(dim=-1).diff(dim=-1).abs().mean((1, 2, 3))
    assert torch.corrcoef(torch.stack([rough, strength]))[0, 1] > 0


def test_training_and_test_pieces_share_no_pixels(monkeypatch):
    # a photo whose columns are numbered shows where a piece comes from
    photo = (torch.arange(640.0) / 640).expand(3, 427, 640)
    monkeypatch.setattr(charm, "_photos", lambda: [photo])
    monkeypatch.setattr(charm, "DEGRADED_SHARE", 0)
    train, _ = charm.degraded_photos(200, seed=0, test=False)
    test, _ = charm.degraded_photos(200, seed=0, test=True)
    assert train.max() < test.min()
