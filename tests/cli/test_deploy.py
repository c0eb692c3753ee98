from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vitkit.cli import app
from vitkit.models.io import ModelConfig, construct, save_model

pytest.importorskip("openvino")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = ModelConfig(
        base="vit_femto",
        base_options={"img_size": 8, "in_chans": 1, "num_classes": 10},
        image_size=(8, 8),
        in_chans=1,
        classes=tuple("0123456789"),
    )
    model = construct(config)
    torch.nn.init.normal_(model.model.head.weight, std=0.5)
    save_model(model, config, tmp_path / "studies" / "models" / "vit")
    return tmp_path / "studies" / "models" / "vit"


def run(*arguments):
    return CliRunner().invoke(app, ["deploy", *map(str, arguments)])


def test_a_model_becomes_an_artefact_that_predicts(folder, tmp_path):
    out = tmp_path / "deployed"
    options = (
        folder,
        "--data",
        "digits",
        "--out",
        out,
        "--engines",
        "openvino",
        "--precisions",
        "f32",
        "--budget",
        "20s",
    )
    found = run(*options)
    assert found.exit_code == 0, found.output
    assert "openvino f32" in found.output and "vitkit serve" in found.output
    from vitkit.deploy import load

    assert load(out).labels == tuple("0123456789")
    assert json.loads(run(*options, "--json").output)["cached"] is True


def test_what_the_engine_takes(folder, tmp_path):
    from vitkit.deploy import load

    options = (
        folder,
        "--data",
        "digits",
        "--engines",
        "openvino,torch-eager",
        "--precisions",
        "f32",
        "--budget",
        "20s",
    )
    found = run(*options, "--bake", "--out", tmp_path / "baked")
    assert found.exit_code == 0, found.output
    assert "cannot take the preparation" in " ".join(found.output.split())
    assert load(tmp_path / "baked").run_pixels(np.zeros((1, 30, 20, 1), np.uint8)).shape == (1, 10)
    found = run(*options, "--free-size", "--out", tmp_path / "free")
    assert found.exit_code == 0, found.output
    assert load(tmp_path / "free").run(np.zeros((1, 1, 12, 10))).shape == (1, 10)


def test_the_study_says_which_images(folder, tmp_path):
    (tmp_path / "studies" / "study.yaml").write_text("data: {path: digits}\n")
    found = run(
        folder, "--out", tmp_path / "d", "--engines", "openvino", "--precisions", "f32", "--json", "--limit", 50
    )
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["rows"][0]["fidelity"]["images"] == 50


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give some with --data"),
        (["--data", "digits", "--batch", "0"], "positive whole numbers"),
        (["--data", "digits", "--batch", "x"], "--batch x must be numbers"),
        (["--data", "digits", "--merge", "1.5"], "between 0 and 1"),
        (["--data", "digits", "--engines", "openvin"], "Did you mean 'openvino'"),
        (["--data", "digits", "--budget", "soon"], "not a duration"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--data", "digits", "--bake", "--free-size"], "choose one"),
    ],
)
def test_bad_input(folder, tmp_path, arguments, said):
    found = run(folder, "--out", tmp_path / "d", *arguments)
    assert found.exit_code == 2
    assert said in " ".join(found.output.split())
    assert not (tmp_path / "d").exists()


def test_no_model(tmp_path):
    found = run(tmp_path, "--data", "digits")
    assert found.exit_code == 2 and "holds no model" in " ".join(found.output.split())


def test_engines_are_listed():
    found = run(".", "--engines", "list", "--json")
    rows = {row["engine"]: row for row in json.loads(found.output)}
    assert "f32" in rows["openvino"]["precisions"] and "cuda-graphs" in rows
