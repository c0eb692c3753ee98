"""An objective that takes the place of the supervised training, as a study runs it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vitkit.data import make_loader, open_source
from vitkit.errors import BadInput
from vitkit.models.counterfactual import Counterfactual
from vitkit.models.io import load_model
from vitkit.study.recipe import resolve_recipes
from vitkit.study.run import run_study
from vitkit.study.settings import make_settings


def made(path, recipes, **protocol):
    return make_settings(
        {
            "name": "tail",
            "data": {"path": str(path)},
            "protocol": {"epochs": 2, "batch_size": 16, "precision": "fp32", "long_tail": 4} | protocol,
            "recipes": recipes,
            "measures": {"attacks": [], "explainers": [], "latency": False, "bootstrap": 200},
        }
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("tail") / "images.npz"
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 2
    images = rng.integers(0, 90, (120, 8, 8))
    images[labels == 1, :, 4:] += 140
    np.savez(file, x=images.astype(np.uint8), y=labels)
    return file


@pytest.fixture(scope="module")
def study(path, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    recipes = ["vit", "tscnet:gamma=0.5", "mae+tscnet:gamma=0.5+tome:r=2"]
    return run_study(made(path, recipes), out), out


def stages(out, kind):
    return [p for p in (out / "stages").iterdir() if p.name.startswith(f"{kind}-")]


def test_it_replaces_the_training_and_nothing_else(study):
    result, out = study
    assert [r.status for r in result.recipes] == ["ok"] * 3, [r.error for r in result.recipes]
    assert len(stages(out, "train")) == 3 and len(stages(out, "pretrain")) == 1
    assert "train the baseline ViT by tscnet (gamma=0.5) with AdamW" in result.recipes[1].steps
    assert result.recipes[2].steps[0].startswith("pretrain with mae")
    histories = [json.loads((p / "history.json").read_text())["rows"] for p in stages(out, "train")]
    assert sorted("val_gamma" in rows[-1] for rows in histories) == [False, True, True]
    assert all(len(rows) == 2 for rows in histories)


def test_the_saved_model_subtracts_the_background(study):
    _, out = study
    found = [load_model(p)[0] for p in stages(out, "train")]
    gammas = sorted(m.model.gamma if isinstance(m.model, Counterfactual) else 0.0 for m in found)
    assert gammas == [0.0, 0.5, 0.5]
    (merged,) = (load_model(p) for p in stages(out, "transform"))
    assert [s["name"] for s in merged[1].applied] == ["tscnet", "tome"]
    assert merged[0](torch.rand(2, 1, 8, 8)).isfinite().all()


def test_the_training_part_is_long_tailed_and_the_others_are_not(study):
    _, out = study
    (data,) = stages(out, "data")
    labels = np.arange(120) % 2
    with np.load(data / "folds.npz") as folds:
        counts = {part: np.bincount(labels[folds[f"{part}_0"]]).tolist() for part in ("train", "val", "test")}
    assert counts["train"][1] == counts["train"][0] // 4 and counts["train"][0] > 30
    assert counts["test"] == [12, 12] and counts["val"] == [6, 6]


def test_other_data_keep_their_key(path, tmp_path):
    from vitkit.study.plan import make_plan
    from vitkit.study.stages import read_facts

    run_study(made(path, ["vit"], long_tail=None, epochs=1), tmp_path)
    (data,) = stages(tmp_path, "data")
    plan = make_plan(made(path, ["vit"]), resolve_recipes(made(path, ["vit"])), read_facts(data), 1)
    assert all("method" not in stage.settings for stage in plan.stages.values() if stage.kind == "train")


def test_only_one_objective_can_take_the_place(path):
    with pytest.raises(BadInput, match="both take the place"):
        resolve_recipes(made(path, ["tscnet+tscnet"]))
    with pytest.raises(BadInput, match="mass=0"):
        resolve_recipes(made(path, ["tscnet:mass=0"]))


def test_a_subset_of_a_loader(path):
    source = open_source(str(path))
    loader = make_loader(source, np.arange(100), (8, 8), 1, batch_size=16, train=True, augment="light")
    part = loader.subset(np.array([3, 5, 99]), train=False)
    (batch,) = list(part)
    assert batch["indices"].tolist() == [3, 5, 99] and not part.names
    plain = make_loader(source, np.array([3, 5, 99]), (8, 8), 1)
    assert torch.equal(batch["images"], next(iter(plain))["images"])
    rest = loader.subset(np.arange(50))
    rest.set_epoch(1)
    seen = torch.cat([b["indices"] for b in rest])
    assert rest.train and seen.tolist() != list(range(50)) and sorted(seen.tolist()) == list(range(50))
