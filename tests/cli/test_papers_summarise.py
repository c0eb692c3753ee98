"""What `vitkit papers summarise` keeps, prints, and how it ends."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from vitkit.catalogue.digests import Digest, Row
from vitkit.catalogue.library import Library
from vitkit.catalogue.summaries import Endpoint, NoSummary
from vitkit.cli import app

ROWS = (
    Row(arxiv_id="2505.00001", title="A", abstract="We gain 2.1%.", date="2025-05-01", section="K", form="table"),
    Row(
        arxiv_id="2505.00002",
        title="B",
        abstract="It is [bold]fast[/bold].",
        date="2025-05-02",
        section="K",
        form="table",
    ),
    Row(
        arxiv_id="2505.00003", title="C", summary="Own.", abstract="Long.", date="2025-05-03", section="D", form="daily"
    ),
    Row(arxiv_id="2505.00004", title="D", date="2025-05-04", section="D", form="daily"),
)


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "VITKIT_SUMMARY_MODEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VITKIT_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Library() as opened:
        opened.merge(Digest(rows=ROWS, source="a.md"))
        yield opened


def summarise(*arguments):
    return CliRunner().invoke(app, ["papers", "summarise", *arguments], env={"COLUMNS": "150"})


def summaries(library):
    return {row.arxiv_id[-1]: row.summary for row in library.papers()}


def test_without_an_endpoint(library):
    done = summarise()
    assert done.exit_code == 0 and done.stderr == ""
    assert "2 summaries made, 0 of them marked" in done.stdout and "0 papers got none" in done.stdout
    assert summaries(library) == {"1": "We gain 2.1%.", "2": "It is [bold]fast[/bold].", "3": "Own.", "4": ""}
    assert "Nothing to do: of 4 papers 1 have no abstract" in summarise().stdout
    assert summarise("--again").exit_code == 0 and summaries(library)["3"] == "Long."


def test_which(library):
    found = json.loads(summarise("--json", "--limit", "1").stdout)
    assert [each["arxiv_id"] for each in found["summarised"]] == ["2505.00002"]
    assert json.loads(summarise("--json", "--section", "d").stdout)["summarised"] == []
    assert json.loads(summarise("--json", "--since", "2025-05-02").stdout)["summarised"] == []
    assert len(json.loads(summarise("--json", "--section", "k").stdout)["summarised"]) == 1


@pytest.fixture
def endpoint(monkeypatch):
    """A model on loopback that says of each title what ``says`` has for it."""
    says: dict[str, object] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = says.get(json.loads(asked["messages"][1]["content"])["title"], 404)
            content = {"choices": [{"index": 0, "message": {"role": "assistant", "content": answer}}]}
            self.send_response(answer if isinstance(answer, int) else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    says["address"] = f"http://127.0.0.1:{server.server_port}/v1"
    yield says
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_by_flag_and_by_environment(library, endpoint, monkeypatch):
    endpoint |= {"A": "It gains 3%.", "B": "It is fast."}
    done = summarise("--endpoint", endpoint["address"], "--model", "m", "--limit", "1")
    assert done.exit_code == 0
    assert done.stderr == f"Titles and abstracts are sent to {endpoint['address']} (model m).\n"
    monkeypatch.setenv("OPENAI_BASE_URL", str(endpoint["address"]))
    monkeypatch.setenv("VITKIT_SUMMARY_MODEL", "m")
    done = summarise("--json")
    marked = "It gains 3%. [not in the abstract: 3%]"
    paper = {"arxiv_id": "2505.00001", "title": "A", "summary": marked, "not_in_abstract": ["3%"]}
    assert json.loads(done.stdout)["summarised"] == [paper]
    assert "are sent to" in done.stderr
    assert summaries(library) == {"1": marked, "2": "It is fast.", "3": "Own.", "4": ""}


def test_the_table_tells_what_is_marked_and_what_failed(library, endpoint):
    endpoint |= {"A": "It gains 3% and 4×.", "B": ""}
    done = summarise("--endpoint", str(endpoint["address"]), "--model", "m")
    assert done.exit_code == 1
    text = " ".join(done.stdout.split())
    assert "1 summaries made, 1 of them marked" in text and "1 papers got none" in text
    assert "2505.00001 3%, 4×" in text and "2505.00002 The answer of the model m was empty." in text
    assert summaries(library)["2"] == ""


def test_what_was_made_before_a_fault_is_kept(library, endpoint):
    endpoint |= {"B": "It is fast."}
    done = summarise("--endpoint", str(endpoint["address"]), "--model", "m")
    assert done.exit_code == 2
    assert "has no model 'm'" in done.stderr and "1 summary was made and is kept; the same" in done.stderr
    assert summaries(library)["2"] == "It is fast."


def test_an_interrupt_loses_the_one_being_made(library, monkeypatch):
    def call(self, row):
        if row.title == "A":
            raise KeyboardInterrupt
        return "It is fast."

    monkeypatch.setattr(Endpoint, "__call__", call)
    done = summarise("--endpoint", "http://127.0.0.1:1/v1", "--model", "m")
    assert done.exit_code == 130 and "1 summary was made and is kept" in done.stderr
    assert summaries(library) == {"1": "", "2": "It is fast.", "3": "Own.", "4": ""}


def test_a_failing_paper_keeps_the_summary_it_had(library, monkeypatch):
    def call(self, row):
        raise NoSummary("no luck")

    monkeypatch.setattr(Endpoint, "__call__", call)
    assert summarise("--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--again").exit_code == 1
    assert summaries(library)["3"] == "Own."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "m"), "--model m needs the endpoint"),
        (("--endpoint", "http://x/v1"), "Which model of the endpoint"),
        (("--endpoint", "", "--model", "m"), "'' is no address like"),
        (("--since", "yesterday"), "--since 'yesterday' must be a day"),
        (("--section", "E"), "No section is called 'E'"),
    ],
)
def test_what_cannot_be_meant(arguments, message):
    done = summarise(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
