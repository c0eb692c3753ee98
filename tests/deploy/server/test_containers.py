"""The container's files name options and routes of the server; they must exist."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from vitkit.cli.serve import serve
from vitkit.deploy.server import make_app

FOLDER = Path(__file__).parents[3] / "containers"
OPTIONS = {f"--{name.replace('_', '-')}" for name in inspect.signature(serve).parameters} - {"--path"}


@pytest.fixture(scope="module")
def kinds() -> dict:
    return {part["kind"]: part for part in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())}


@pytest.fixture(scope="module")
def container(kinds) -> dict:
    (only,) = kinds["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def test_options_exist(container):
    docker = (FOLDER / "Dockerfile").read_text()
    args = container["args"]
    assert {a for a in args if a.startswith("--")} <= OPTIONS
    command = json.loads(re.search(r"^CMD (\[.*\])$", docker, flags=re.MULTILINE)[1])
    assert {a for a in command if a.startswith("--")} <= OPTIONS
    assert args[0] == command[0] == "/model"
    mounts = {m["mountPath"] for m in container["volumeMounts"]}
    assert "/model" in mounts and str(Path(args[args.index("--api-key-file") + 1]).parent) in mounts


def test_probes_ask_routes_that_need_no_key(container, served):
    routes = {route.path for route in make_app(served, api_key="k").routes}
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {p["path"] for p in probes.values()} == {"/readyz", "/healthz"} <= routes
    assert probes["liveness"]["path"] == "/healthz" and probes["readiness"]["path"] == "/readyz"
    port = next(p["containerPort"] for p in container["ports"] if p["name"] == "http")
    assert str(port) == container["args"][container["args"].index("--port") + 1]
    assert "/healthz" in (FOLDER / "Dockerfile").read_text()


def test_there_is_time_to_finish(kinds, container):
    args = container["args"]
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    allowed = kinds["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert allowed > before + float(args[args.index("--timeout") + 1]) + 5


def test_the_service_finds_the_pods(kinds):
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for part in ("Service", "PodDisruptionBudget"):
        selector = kinds[part]["spec"]["selector"]
        assert selector.get("matchLabels", selector).items() <= labels.items()
