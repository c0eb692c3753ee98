from __future__ import annotations

import torch

import vitkit.evidence.gmar as evidence
from vitkit.explain.attention_map import attention_map
from vitkit.explain.bench import explanation_bench
from vitkit.explain.faithfulness import score_explainers
from vitkit.explain.grad_cam import grad_cam
from vitkit.models.build import build
from vitkit.testing.worlds import clutter_canvas


def test_one_row_a_map_with_intervals():
    torch.manual_seed(0)
    net = build("vit_femto", img_size=(12, 20), patch_size=4, in_chans=1, num_classes=3, depth=2).train()
    images, masks = torch.rand(6, 1, 12, 20), torch.zeros(6, 12, 20, dtype=torch.bool)
    masks[:, 2:6, 3:9] = True
    rows = explanation_bench(net, {"grad-cam": grad_cam, "attention": attention_map}, images, masks=masks, draws=2)
    assert [r["explainer"] for r in rows] == ["grad-cam", "attention", "random", "centred gaussian"]
    assert net.training and all(list(r) == list(rows[0]) for r in rows)
    expected = score_explainers(net, images, {"attention": attention_map(net, images).map})["attention"]
    for measure, values in expected.items():
        mean, low, high = rows[1][measure]
        assert abs(mean - values.mean().item()) < 1e-6 and low <= mean + 1e-6 and high >= mean - 1e-6
    assert rows[0]["ms_per_image"] > 0 and rows[2]["ms_per_image"] is None
    assert 0 <= rows[0]["energy_pointing_game"][0] <= 1


def test_the_experiment_runs_end_to_end(monkeypatch):
    monkeypatch.setattr(evidence, "NUM_TRAIN", 64)
    monkeypatch.setattr(evidence, "NUM_TEST", 6)
    monkeypatch.setattr(evidence, "EPOCHS", 1)
    monkeypatch.setattr(evidence, "STEPS", 3)
    found = evidence.run(seeds=(0, 1))
    names = [r["explainer"] for r in found.rows]
    assert names[:2] == ["random", "centred gaussian"] and {"rollout", "GMAR-L1", "GMAR-L2", "Grad-CAM"} <= set(names)
    assert next(r for r in found.rows if r["explainer"] == "rollout")["energy_in_box vs rollout"] == "–"


def test_the_verdict_follows_the_intervals():
    up, down, open_ = (0.1, 0.05, 0.2), (-0.1, -0.2, -0.05), (0.0, -0.1, 0.1)
    assert evidence._verdict([up, up]) is True
    assert evidence._verdict([up, down]) is False
    assert evidence._verdict([up, open_]) is None


def test_the_canvas_has_its_box():
    images, _, boxes = clutter_canvas(3)
    assert images.shape[-1] == evidence.SIZE and boxes.shape == (3, 4)
