"""L-CLIP: its loss by a loop, what it asks for, and that it learns pairs."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

import vitkit  # noqa: F401 - registers the networks
from vitkit.errors import BadInput
from vitkit.models.lorentz import LorentzLinear, distance, inner, lift
from vitkit.pretrain.lorentz_clip import LorentzCLIP


class Words(nn.Module):
    """Numbers to points."""

    def __init__(self, features):
        super().__init__()
        self.table = nn.Embedding(8, features - 1)

    def forward(self, words):
        return lift(self.table(words), 1.0)


def pair(**options):
    torch.manual_seed(0)
    image = timm.create_model("lvit_femto", img_size=8, in_chans=1, num_classes=0, depth=1)
    return LorentzCLIP(image, Words(9), (68, 9), 17, **options), {
        "images": torch.randn(8, 1, 8, 8),
        "texts": torch.arange(8),
    }


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_a_loop(normalize):
    clip, batch = pair(normalize=normalize)
    out = clip(batch)
    x, y = clip.encode(batch["images"]), clip.encode(batch["texts"], 1)
    assert (inner(x, x) + 1).abs().max() < 1e-3
    if normalize:
        assert torch.allclose(x[:, 1:].norm(dim=1), torch.ones(8))
    total = 0.0
    for first, second in ((x, y), (y, x)):
        for i in range(8):
            logits = torch.stack([-distance(first[i], second[j], 1.0) / 0.07 for j in range(8)])
            total -= float(logits.log_softmax(0)[i].detach()) / 16
    assert float(out["loss"].detach()) == pytest.approx(total, rel=1e-4)
    assert out["output"].shape == (8, 8) and (out["output"] <= 0).all()


def test_equal_points_are_the_most_similar():
    clip, _ = pair(keys=("a", "b"))
    clip.first, clip.second = nn.Identity(), nn.Identity()
    clip.second_proj = clip.first_proj = LorentzLinear(9, 17)
    points = lift(torch.randn(6, 8), 1.0)
    out = clip({"a": points, "b": points})
    assert (out["output"].argmax(1) == torch.arange(6)).all() and float(out["logs"]["retrieval"]) == 1


def test_it_learns_which_belong_together():
    clip, batch = pair()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        out = clip(batch)
        out["loss"].backward()
        optimizer.step()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in clip.parameters())
    assert float(out["loss"].detach()) < 0.3 * math.log(8) and float(out["logs"]["retrieval"]) == 1


def test_what_it_asks_for():
    clip, batch = pair()
    with pytest.raises(BadInput, match="'texts'"):
        clip({"images": batch["images"]})
    with pytest.raises(BadInput, match="8 images and 3 texts"):
        clip({**batch, "texts": torch.arange(3)})
    with pytest.raises(BadInput, match="temperature"):
        pair(temperature=0.0)
