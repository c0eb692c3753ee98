"""Self-pretraining as a study runs it: on the training part only, then the same fine-tuning as every other arm."""

from __future__ import annotations

import json
import sqlite3

import numpy as np
import pytest

from vitkit.pretrain.mae import MAE
from vitkit.study.run import run_study
from vitkit.study.settings import make_settings


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three arms on sixty small scans; which images the objectives were shown."""
    root = tmp_path_factory.mktemp("self")
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = rng.integers(0, 90, (60, 8, 8))
    images[labels == 1, :, 4:] += 140
    np.savez(root / "scans.npz", x=images.astype(np.uint8), y=labels)
    made = make_settings(
        {
            "name": "self",
            "data": {"path": str(root / "scans.npz")},
            "protocol": {"epochs": 1, "pretrain_epochs": 2, "batch_size": 16, "precision": "fp32"},
            "recipes": ["vit", "defect-mae", "mae"],
            "measures": {"attacks": [], "explainers": [], "latency": False, "bootstrap": 200},
        }
    )
    shown: set[int] = set()
    forward = MAE.forward

    def watched(self, batch):
        shown.update(batch["indices"].tolist())
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MAE, "forward", watched)
        result = run_study(made, root / "out")
    rows = sqlite3.connect(root / "out" / "study.db").execute("SELECT key, kind, settings FROM stages").fetchall()
    return result, shown, root / "out", [(key, kind, json.loads(text)) for key, kind, text in rows]


def test_no_test_image_is_seen_in_pretraining(study):
    result, shown, out, stages = study
    assert [r.status for r in result.recipes] == ["ok"] * 3, [r.error for r in result.recipes]
    (data,) = (key for key, kind, _ in stages if kind == "data")
    with np.load(out / "stages" / data / "folds.npz") as folds:
        train, val, test = (set(folds[f"{part}_0"].tolist()) for part in ("train", "val", "test"))
    assert len(train) + len(val) + len(test) == 60 and test
    assert shown == train
    for key, kind, _ in stages:
        if kind == "predict":
            with np.load(out / "stages" / key / "predictions.npz") as held:
                assert set(held["test_indices"].tolist()) == test


def test_all_arms_share_data_and_fine_tuning(study):
    _, _, _, stages = study
    trained = [settings for _, kind, settings in stages if kind == "train"]
    pretrained = {key: settings["method"]["name"] for key, kind, settings in stages if kind == "pretrain"}
    assert sorted(pretrained.values()) == ["defect-mae", "mae"]
    assert {settings["init"] for settings in trained} == {None, *pretrained}
    for settings in trained:
        assert {k: v for k, v in settings.items() if k != "init"} == {
            k: v for k, v in trained[0].items() if k != "init"
        }
    epochs = {kind: settings["train"]["epochs"] for _, kind, settings in stages if kind in ("train", "pretrain")}
    assert epochs == {"pretrain": 2, "train": 1}
