from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from vitkit.cli.serve import serve
from vitkit.errors import BadInput, MissingExtra
from vitkit.models.io import ModelConfig, construct, save_model
from vitkit.study.results import DataReport, Interval, RecipeResult, StudyResult, write_json

CONFIG = ModelConfig(
    base="vit_femto", base_options={"img_size": [8, 8], "num_classes": 2}, image_size=(8, 8), classes=("no", "yes")
)
COMMAND = [sys.executable, "-c", "import typer; from vitkit.cli.serve import serve; typer.run(serve)"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(construct(CONFIG), CONFIG, folder)
    return folder


def failure(*arguments: str) -> BaseException:
    app = typer.Typer()
    app.command()(serve)
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code and done.exception is not None, done.output
    return done.exception


def test_bad_paths_keys_and_ports_are_told_in_a_sentence(model, tmp_path, monkeypatch):
    free = ("--port", "0")
    assert "There is no folder" in str(failure(tmp_path / "gone", *free))
    assert "holds no model" in str(failure(tmp_path, *free))
    assert "cannot be read" in str(failure(model, "--api-key-file", tmp_path / "gone"))
    (tmp_path / "key").write_text("\n")
    assert "must hold a key" in str(failure(model, "--api-key-file", tmp_path / "key"))
    assert "is no address of this machine" in str(failure(model, "--host", "no.such.host.invalid"))
    assert "max_images = 64" in str(failure(model, "--queue", "3"))
    monkeypatch.setenv("VITKIT_API_KEY", "two\nlines")
    assert "VITKIT_API_KEY must hold" in str(failure(model))
    monkeypatch.delenv("VITKIT_API_KEY")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = failure(model, "--port", port)
    assert isinstance(error, BadInput) and f"Port {port} of 127.0.0.1 cannot be used" in str(error)


def test_a_missing_package_is_told_with_its_command(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    error = failure(model)
    assert isinstance(error, MissingExtra) and 'pip install "vitkit[serve]"' in str(error)


def start(*arguments: str, **environment: str) -> tuple[subprocess.Popen, int, str]:
    """A server in a process of its own, its port, and the line it announced itself with."""
    command = [*COMMAND, *(str(a) for a in arguments), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    said = ""
    for line in process.stdout:
        said += line
        if " on http://" in line:
            address = line.split(" on http://")[1].split()[0]
            return process, int(address.rsplit(":", 1)[1]), said
    raise AssertionError(said + process.stderr.read())


def get(port: int, path: str, **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    status, content = answer.status, json.loads(answer.read())
    connection.close()
    return status, content


def stop(process: subprocess.Popen, number: int) -> int:
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors
    return process.returncode


def test_a_study_serves_its_winner_and_stops_on_a_signal(model, tmp_path):
    recipes = []
    for name, accuracy in (("worse", 0.6), ("better", 0.9)):
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / name).symlink_to(model)
        measures = {"accuracy": Interval(value=accuracy)}
        recipes.append(RecipeResult(name=name, measures=measures, model_dir=f"models/{name}"))
    write_json(StudyResult(name="study", data=DataReport(name="x"), recipes=recipes), tmp_path / "results.json")
    process, port, said = start(tmp_path, VITKIT_API_KEY="s3cret")
    try:
        assert "better is the best of" in said
        assert get(port, "/model")[0] == 401
        status, content = get(port, "/model", **{"X-API-Key": "s3cret"})
        assert status == 200 and content["labels"] == ["no", "yes"] and "rollout" in content["explainers"]
        assert get(port, "/readyz") == (200, {"status": "ready"})
        assert stop(process, signal.SIGTERM) == 0
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_several_processes_share_a_port(model, number):
    process, port, said = start(model, "--workers", "2")
    try:
        assert "from 2 processes" in said
        assert get(port, "/readyz")[0] == 200
        assert stop(process, number) == 0
    finally:
        process.kill()


@pytest.mark.slow
def test_if_one_process_cannot_serve_all_end(tmp_path):
    # a folder that looks like a model's until it is loaded
    (tmp_path / "config.json").write_text("{}")
    process, _, _ = start(tmp_path, "--workers", "2")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "base = None must be the name" in errors and "Traceback" not in errors
