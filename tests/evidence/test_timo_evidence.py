"""The series of images that TiMo's evidence is about, and the baseline it brings along."""

from __future__ import annotations

import torch

from vitkit.evidence.timo import ARMS, DATES, PATTERNS, SIDE, Divided, network, seasons
from vitkit.models.layout import TokenLayout
from vitkit.models.vit import Attention


def test_patterns_are_what_their_names_say():
    clips, labels = seasons(300, seed=3)
    assert clips.shape == (300, DATES, SIDE, SIDE) and labels.bincount().tolist() == [50] * len(PATTERNS)
    again, _ = seasons(300, seed=3)
    assert torch.equal(clips, again)
    of = {name: clips[labels == i] for i, name in enumerate(PATTERNS)}
    corr = lambda a, b: (a.flatten(1) * b.flatten(1)).sum(1) / (a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1))  # noqa: E731
    assert (corr(of["still"][:, 0], of["still"][:, 5]) > 0.8).all()
    drift = of["drift"]
    assert corr(drift[:, 0], drift[:, 2]).mean() < 0.3
    assert (corr(drift[:, 0].roll(6, -1), drift[:, 2]) > 0.8).all()
    power = {name: x.square().mean((2, 3)) for name, x in of.items()}
    assert (power["early season"][:, :3].sum(1) > power["early season"][:, 3:].sum(1)).float().mean() > 0.9
    assert (power["late season"][:, :3].sum(1) < power["late season"][:, 3:].sum(1)).float().mean() > 0.9
    assert (power["clearing"][:, 0] > power["clearing"][:, -1]).float().mean() > 0.95
    assert (power["regrowth"][:, 0] < power["regrowth"][:, -1]).float().mean() > 0.95


def test_divided_attention_is_a_loop_over_places_and_dates():
    torch.manual_seed(0)
    mixer, x = Divided(8, 2), torch.randn(2, 3 * 4, 8)
    out = mixer(x, TokenLayout(grid=(3, 2, 2)))
    clip, update = x.view(2, 3, 4, 8), torch.zeros(2, 3, 4, 8)
    for place in range(4):
        update[:, :, place] = Attention.forward(mixer.over_dates, clip[:, :, place], TokenLayout(grid=(3, 1)))
    for date in range(3):
        row = (clip + update)[:, date]
        expected = update[:, date] + Attention.forward(mixer.over_places, row, TokenLayout(grid=(2, 2)))
        torch.testing.assert_close(out.view(2, 3, 4, 8)[:, date], expected)


def test_arms_differ_in_the_first_attention_alone():
    assert {arm: type(network(arm, 0).stages[0].blocks[0].block.attn).__name__ for arm in ARMS} == {
        "joint": "Attention",
        "gyroscope": "STGA",
        "gyroscope by medians": "STGA",
        "divided": "Divided",
    }
    assert network("gyroscope by medians", 0).stages[0].blocks[0].block.attn.variant == "diff"
