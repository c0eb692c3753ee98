"""The experiment on LViT runs at toy size, and its measures are what they say."""

from __future__ import annotations

import pytest
import torch

from vitkit.evidence import hypercore


def test_runs_at_toy_size(monkeypatch, shared_data):
    for name, value in (("NUM_TRAIN", 32), ("NUM_TEST", 20), ("EPOCHS", 1), ("DEPTH", 1), ("NUM_DELTA", 2)):
        monkeypatch.setattr(hypercore, name, value)
    steps = []
    found = hypercore.run(seeds=(0,), progress=lambda what, done, total: steps.append((done, total)))
    assert found.shown in (True, False, None) and len(found.rows) == 5
    assert [done for done, _ in steps] == list(range(steps[0][1]))


def test_errors_across_super_classes_are_counted_among_errors():
    labels = torch.tensor([0, 5, 8, 1, 9])
    # right; another shoe; a shoe for a bag; right; a dress for a boot
    assert hypercore.super_share(torch.tensor([0, 7, 5, 1, 3]), labels) == pytest.approx(2 / 3)
    assert hypercore.super_share(labels, labels) == 0


def test_the_networks_are_of_equal_size_and_seeded():
    sizes = [sum(p.numel() for p in hypercore.build(arm, 0).parameters()) for arm in hypercore.ARMS]
    assert max(sizes) / min(sizes) < 1.03
    first, second = (hypercore.build(hypercore.LVIT, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
