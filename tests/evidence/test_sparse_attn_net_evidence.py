from __future__ import annotations

import torch

from vitkit.evidence import convsharevit, sparse_attn_net
from vitkit.testing.worlds import digits


def test_pixels_at_toy_size(monkeypatch):
    for name, value in {"NUM_TRAIN": 64, "NUM_TEST": 16, "EPOCHS": 2, "CANVAS": 16}.items():
        monkeypatch.setattr(sparse_attn_net, name, value)
    found = sparse_attn_net.run(seeds=(0, 1))
    assert [row["model"] for row in found.rows][2:4] == ["random pixels", "small CNN"]
    # the random arm has the learned one's pixels
    assert found.rows[0]["share of pixels"] == found.rows[2]["share of pixels"] != "0.300"
    assert found.rows[0]["MFLOPs"] == found.rows[2]["MFLOPs"] and found.shown in (True, False, None)


def test_the_digit_stands_in_the_middle():
    canvas = sparse_attn_net.on_canvas(digits().x_test[:5])
    assert canvas.shape == (5, 1, 24, 24) and float(canvas[..., 6:18, 6:18].sum() / canvas.sum()) == 1
    # a wiped digit leaves nothing to choose by
    assert torch.equal(sparse_attn_net.on_canvas(torch.zeros(1, 1, 8, 8)), torch.zeros(1, 1, 24, 24))


def test_convolutions_at_toy_size(monkeypatch, shared_data):
    for name, value in {"NUM_TRAIN": 32, "NUM_TEST": 16, "NUM_MAPS": 8, "EPOCHS": 1, "DEPTH": 1}.items():
        monkeypatch.setattr(convsharevit, name, value)
    found = convsharevit.run(seeds=(0, 1))
    assert [row["projections and MLP"] for row in found.rows] == [convsharevit.REFERENCE, *convsharevit.ARMS]
    assert found.rows[0]["attention like the ViT's"] == "1.000 ± 0.000"
    assert found.rows[1]["parameters"] == found.rows[2]["parameters"] and found.shown in (True, False, None)
