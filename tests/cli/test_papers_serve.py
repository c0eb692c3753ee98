"""`vitkit papers serve`: from the command line to an answer."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from vitkit.catalogue.digests import Digest, Row
from vitkit.catalogue.library import Library
from vitkit.cli.papers_serve import papers_serve
from vitkit.errors import BadInput, MissingExtra

COMMAND = [sys.executable, "-c", "from vitkit.cli.shell import main; main()", "papers", "serve"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_HOME", str(tmp_path))
    return tmp_path


def failure(*arguments: str) -> BaseException:
    app = typer.Typer()
    app.command()(papers_serve)
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code and done.exception is not None, done.output
    return done.exception


def test_bad_hosts_and_ports_are_told_in_a_sentence():
    assert "is no address of this machine" in str(failure("--host", "no.such.host.invalid"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = failure("--port", port)
    assert isinstance(error, BadInput) and f"Port {port} of 127.0.0.1 cannot be used" in str(error)
    assert "--port" in str(error)


def test_a_missing_package_is_told_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    error = failure()
    assert isinstance(error, MissingExtra) and str(error).startswith("`vitkit papers serve` needs uvicorn")
    assert 'pip install "vitkit[serve]"' in str(error)


def test_a_damaged_library_is_told_before_anything_is_served(home):
    (home / "papers.db").write_bytes(b"no database " * 1000)
    error = failure("--port", "0")
    assert isinstance(error, BadInput) and str(home / "papers.db") in str(error)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_stop(home, number):
    with Library(home / "papers.db") as library:
        library.merge(Digest(rows=(Row(arxiv_id="9901.00001", title="Of zebras"),)))
    process = subprocess.Popen(
        [*COMMAND, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        said = process.stdout.readline()
        assert said.startswith("Your library and the catalogue on http://127.0.0.1:"), said + process.stderr.read()
        connection = http.client.HTTPConnection("127.0.0.1", int(said.rsplit(":", 1)[1]), timeout=60)
        connection.request("GET", "/api/papers?q=zebras")
        answer = connection.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["papers"][0]["title"] == "Of zebras"
        connection.close()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and errors == ""
    finally:
        process.kill()


def test_listing_and_serving_papers_loads_no_torch():
    code = (
        "import sys, vitkit.catalogue.page, vitkit.web.server, vitkit.cli.papers_serve\n"
        "print({'torch', 'timm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
