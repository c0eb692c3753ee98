"""The experiments on graphs and hypergraphs run at toy size, and their measures are what they say."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitkit.evidence import clustervig, hgformer, hgvt
from vitkit.models.backbones.hgvt import HgVT


@pytest.mark.parametrize("module", [hgvt, hgformer, clustervig])
def test_runs_at_toy_size(module, monkeypatch, shared_data):
    for name, value in (("NUM_TRAIN", 32), ("NUM_TEST", 20), ("EPOCHS", 1)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(clustervig, "TOKENS", {49: 2, 196: 1})
    monkeypatch.setattr(clustervig, "ROUNDS", 1)
    steps = []
    found = module.run(seeds=(0,), progress=lambda what, done, total: steps.append((done, total)))
    assert found.shown in (True, False, None)
    assert [done for done, _ in steps] == list(range(steps[0][1]))


def test_average_precision_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(15, 4, generator=generator), dim=1)
    labels = torch.randint(0, 3, (15,), generator=generator)
    total = 0.0
    for q in range(15):
        ranked = sorted((i for i in range(15) if i != q), key=lambda i: -float(vectors[q] @ vectors[i]))[:10]
        hits, score = 0, 0.0
        for place, i in enumerate(ranked, start=1):
            if labels[i] == labels[q]:
                hits += 1
                score += hits / place
        total += score / min(10, int((labels == labels[q]).sum()) - 1)
    assert hgvt.mean_average_precision(vectors, labels) == pytest.approx(total / 15)
    same = torch.eye(3)[labels]
    assert hgvt.mean_average_precision(same, labels) == pytest.approx(1)


def test_both_networks_are_of_equal_size_and_seeded():
    sizes = [sum(p.numel() for p in hgvt.build(arm, 0).parameters()) for arm in (hgvt.VIT, hgvt.HGVT)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    first, second = (hgvt.build(hgvt.HGVT, 3) for _ in range(2))
    assert isinstance(first, HgVT)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
