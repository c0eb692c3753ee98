from __future__ import annotations

import shutil

import numpy as np
import pytest

from vitkit.deploy import load
from vitkit.errors import BadInput, UnknownName
from vitkit.models.io import load_model
from vitkit.study import handover
from vitkit.study.handover import study_images
from vitkit.study.report import render
from vitkit.study.results import read_json
from vitkit.study.run import run_study
from vitkit.study.settings import make_settings

QUIET = {"attacks": [], "explainers": [], "latency": False, "bootstrap": 200}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    """60 images of 8×8 in two classes, each with a brightness of its own."""
    images = np.zeros((60, 8, 8), np.uint8)
    images[:, :, :4] = np.arange(60)[:, None, None]
    images[1::2, :, 4:] = 200
    np.savez(tmp_path / "halves.npz", x=images, y=np.arange(60) % 2)
    return tmp_path / "halves.npz"


def settings(data, **deploy):
    return make_settings(
        {
            "data": {"path": str(data)},
            "protocol": {"epochs": 1, "batch_size": 16, "precision": "fp32", "test": 0.3},
            "recipes": ["vit"],
            "measures": QUIET,
            "deploy": {"engines": ["torch-eager"], "batches": [4], "budget": "20s", **deploy},
        }
    )


def test_the_winner_lies_beside_the_report(data, tmp_path):
    made = settings(data)
    result = run_study(made, tmp_path / "out")
    found = result.deployed
    assert found.recipe == "vit" and found.error is None
    assert found.engines[found.chosen].engine == "torch-eager"
    assert found.engines[found.chosen].drop.value == pytest.approx(0, abs=100 / 18)
    assert "Exported to torch-eager" in result.verdict[-1]
    assert read_json(tmp_path / "out" / "results.json") == result
    page = render(result)
    assert 'id="deployed"' in page and "torch-eager f32" in page and 'href="#deployed"' in page
    artefact = load(tmp_path / "out" / found.folder)
    assert artefact.labels == tuple(result.data.classes)
    # nothing changed: nothing is made anew
    before = (tmp_path / "out" / "report.html").stat().st_mtime_ns
    assert run_study(made, tmp_path / "out").deployed == found
    assert (tmp_path / "out" / "report.html").stat().st_mtime_ns == before
    # a lost artefact is made again
    shutil.rmtree(tmp_path / "out" / found.folder)
    again = run_study(made, tmp_path / "out").deployed
    assert again.engines[again.chosen].engine == "torch-eager"
    assert load(tmp_path / "out" / again.folder).labels == artefact.labels


def test_engines_see_no_training_image_when_they_are_compared(data, tmp_path):
    run_study(settings(data), tmp_path / "out")
    _, config = load_model(tmp_path / "out" / "models" / "vit")
    images = study_images(tmp_path / "out", config)
    shade = [np.unique((part[:, 0, 0, 0] * 255).round()) for part in (images.calibration, images.held)]
    with np.load(next((tmp_path / "out" / "stages").glob("data-*")) / "folds.npz") as folds:
        np.testing.assert_array_equal(shade[0], np.sort(folds["train_0"]))
        np.testing.assert_array_equal(shade[1], np.sort(folds["test_0"]))
    np.testing.assert_array_equal(images.held_labels, (images.held[:, 0, 0, 7] > 0.5).astype(int))
    assert study_images(tmp_path, config) is None


def test_a_study_is_whole_without_its_export(data, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise BadInput("no engine is faithful.")

    monkeypatch.setattr("vitkit.deploy.tuner.deploy", fail)
    result = run_study(settings(data), tmp_path / "out")
    assert result.deployed.error == "no engine is faithful." and result.deployed.folder is None
    assert result.verdict[-1] == "vit was not exported: no engine is faithful."
    assert "no engine is faithful" in render(result)
    assert (tmp_path / "out" / "models" / "vit" / "model.safetensors").is_file()


def test_an_engine_that_does_not_exist_is_told_before_anything_is_trained(data, tmp_path, monkeypatch):
    monkeypatch.setattr(handover, "deploy_winner", None)
    with pytest.raises(UnknownName, match="openvino"):
        run_study(settings(data, engines=["openvin"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("deploy", "words"), [({"batches": [0]}, "0 images"), ({"merge": [1.5]}, "1.5 is no share")])
def test_numbers_out_of_range(data, deploy, words):
    with pytest.raises(BadInput, match=words):
        settings(data, **deploy)


def test_an_unknown_key_is_named():
    with pytest.raises(BadInput, match=r"'deploy.max_dorp'.*Did you mean 'max_drop'"):
        make_settings({"deploy": {"max_dorp": 1}})


def test_yes_and_no_are_enough():
    assert make_settings({"deploy": True}).deploy.max_drop == 1.0
    assert make_settings({"deploy": False}).deploy is None
    assert make_settings({}).deploy is None
