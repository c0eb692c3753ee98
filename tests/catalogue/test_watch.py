"""A watch: one digest of several queries, with what no earlier one had."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from vitkit.catalogue.arxiv_feed import Feed
from vitkit.catalogue.digests import read_file
from vitkit.catalogue.library import Library
from vitkit.catalogue.watch import queries, read_watch, watch
from vitkit.errors import BadInput
from vitkit.testing.arxiv_server import Paper, moment, serving

NOW = moment("2025-05-20T06:00")
DAY = timedelta(days=1)
YAML = """\
title: Vision transformers
out: digests/new.md
sections:
  - name: Pruning
    query: token pruning
    category: cs.CV
  - name: Merging
    query: '"token merging"'
"""


@pytest.fixture
def arxiv(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("VITKIT_HOME", str(tmp_path / "home"))
    with serving() as server:
        monkeypatch.setenv("VITKIT_ARXIV_URL", server.url)
        server.papers = [
            paper(1, "Token pruning with a | pipe, [brackets] and $|x|$", comment="CVPR 2025, github.com/o/pruner"),
            paper(2, "Token pruning and token merging <script>alert(1)</script>"),
            paper(3, "Token merging", authors=("Ann One", "Bob Two, Jr.")),
            paper(4, "Nothing of the kind"),
        ]
        yield server


def paper(number, title, days=2.0, **fields):
    # the first is the newest
    published = NOW - days * DAY - timedelta(minutes=number)
    return Paper(arxiv_id=f"2505.{number:05}", published=published, title=title, **fields)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "watch.yaml"
    path.write_text(YAML)
    return path


def run(file, now=NOW, **settings):
    feed = Feed(delay_seconds=0, page_size=10, wait=lambda seconds: None)
    return watch(file, read_watch(file).model_copy(update=settings), feed, now)


def listed(watched):
    return [[row.arxiv_id[-1] for row in part.listed] for part in watched.parts]


@pytest.mark.parametrize("form", ["table", "daily"])
def test_the_digest_is_read_back_with_the_same_rows(arxiv, file, form):
    done = run(file, form=form)
    assert listed(done) == [["1", "2"], ["3"]] and [part.found for part in done.parts] == [2, 2]
    assert done.out == file.parent / "digests" / "new.md"
    assert done.out.read_text().startswith("# Vision transformers, 2025-05-20\n\n## ")
    digest = read_file(done.out)
    assert not digest.unreadable and not digest.notes
    silent = {"table": {"authors": ()}, "daily": {"comment": "", "code": ""}}[form]
    wanted = []
    for part in done.parts:
        heading = part.name if form == "table" else f"Papers for 2025-05-20: {part.name}"
        date = {} if form == "table" else {"date": "2025-05-20"}
        wanted += [replace(row, section=heading, form=form, source="", line=0, **date, **silent) for row in part.listed]
    assert [replace(row, source="", line=0) for row in digest.rows] == wanted
    assert wanted[0].title == "Token pruning with a | pipe, [brackets] and $|x|$"
    assert "<script" not in done.out.read_text()


def test_in_the_library_a_paper_stands_under_all_its_sections(arxiv, file):
    done = run(file)
    assert len(done.merged.new) == 3
    with Library() as library:
        assert [row.arxiv_id[-1] for row in library.rows("Merging")] == ["2", "3"]
        assert library.find("2505.00001").code == "https://github.com/o/pruner"


def test_without_import_there_is_no_library(arxiv, file):
    done = run(file, import_=False)
    assert done.merged is None and done.out is not None and not (file.parent / "home").exists()


def test_the_next_day_has_what_no_earlier_one_had(arxiv, file):
    out = run(file).out
    before = out.read_text()
    done = run(file, NOW + DAY)
    assert done.out is None and listed(done) == [[], []] and out.read_text() == before
    # submitted before the first watch, and listed by arXiv only now; and a version that is no new paper
    arxiv.papers += [paper(5, "Token merging, late"), replace(arxiv.papers[2], version=2)]
    arxiv.papers.pop(2)
    done = run(file, NOW + 2 * DAY)
    assert listed(done) == [[], ["5"]]
    assert [row.arxiv_id for row in read_file(done.out).rows] == ["2505.00005"]
    state = json.loads(file.with_name("watch.state.json").read_text())
    assert state["listed"]["2505.00005"] == "2025-05-22" and state["listed"]["2505.00001"] == "2025-05-20"


def test_what_cannot_come_back_is_forgotten(arxiv, file):
    run(file)
    run(file, NOW + 30 * DAY)
    assert json.loads(file.with_name("watch.state.json").read_text())["listed"] == {}


def test_a_second_run_on_a_day_adds_to_its_digest(arxiv, file):
    run(file)
    arxiv.papers.append(paper(6, "Token pruning once more", days=0.1))
    done = run(file, NOW + timedelta(hours=3))
    assert listed(done) == [["6"], []]
    rows = read_file(done.out).rows
    assert [(row.section, row.arxiv_id[-1]) for row in rows] == [
        ("Pruning", "6"),
        ("Pruning", "1"),
        ("Pruning", "2"),
        ("Merging", "3"),
    ]


def test_a_digest_for_each_day(arxiv, file):
    assert run(file, out="{date}.md").out.name == "2025-05-20.md"


def test_a_window_has_the_same_every_time(arxiv, file):
    for _ in range(2):
        assert listed(run(file, since="7d")) == [["1", "2"], ["3"]]
    assert listed(run(file, since="1d")) == [[], []]
    assert not file.with_name("watch.state.json").exists()


def test_a_limit_leaves_the_rest_for_the_next_day(arxiv, file):
    file.write_text(YAML.replace("category: cs.CV", "limit: 1"))
    done = run(file)
    assert listed(done) == [["1"], ["2", "3"]] and done.parts[0].left_out == 1
    file.write_text(YAML.replace("name: Merging", "name: M\n    limit: 1"))
    assert listed(run(file, NOW + DAY)) == [[], []]
    arxiv.requests.clear()
    done = run(file, NOW + 2 * DAY, since="7d")
    assert done.parts[1].found == 1 and done.parts[1].left_out == 1 and arxiv.requests[-1]["max_results"] == "1"


def test_a_section_that_fails_does_not_hold_up_the_others(arxiv, file):
    arxiv.faults = [(500, {})] * 5
    done = run(file)
    assert "HTTP 500" in done.parts[0].error and listed(done) == [[], ["2", "3"]]
    assert {row.section for row in read_file(done.out).rows} == {"Merging"}
    # and has its turn the next time, with all that came since it last worked
    assert listed(run(file, NOW + DAY)) == [["1"], []]


def test_when_all_fail_nothing_is_written(arxiv, file):
    arxiv.faults = [(500, {})] * 10
    done = run(file)
    assert all(part.error for part in done.parts) and done.out is None and done.merged is None
    assert [path.name for path in file.parent.iterdir()] == ["watch.yaml"]


def test_queries(file):
    assert queries(read_watch(file)) == {
        "Pruning": 'all:"token pruning" AND cat:cs.CV',
        "Merging": 'all:"token merging"',
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("query: token", "quer: token", r"watch.yaml line 5: unknown key 'sections.0.quer'. Did you mean 'query'\?"),
        ("out:", "import_out:", r"unknown key 'import_out'.*Allowed here: title, out, form, since, sections, import"),
        ("out: digests/new.md\n", "", "out is missing"),
        ("title:", "form: tabel\ntitle:", "line 1: form = 'tabel': Input should be 'table' or 'daily'"),
        ("title:", "since: soon\ntitle:", "line 1: since = 'soon': since 'soon' must be a day like"),
        ("category: cs.CV", "limit: 0", "line 6: sections.0.limit = 0: "),
        ("category: cs.CV", "category: [cs.CV, x y]", "sections.0: The category 'x y' must be one of arXiv's"),
        ("query: token pruning\n    category: cs.CV", "limit: 3", "sections.0: There is nothing to ask arXiv for"),
        ("name: Merging", "name: pruning", "sections: two sections are called 'Pruning'"),
        ("name: Merging", 'name: " "', "sections.1.name = ' ': a heading must have words"),
        (YAML, "[]", "must be a mapping with the keys title, out, form, since, sections, import"),
        ("title:", "title: [", "line 2 is not valid YAML"),
    ],
)
def test_mistakes_in_the_file(file, old, new, message):
    assert old in YAML
    file.write_text(YAML.replace(old, new))
    with pytest.raises(BadInput, match=message):
        read_watch(file)


def test_a_day_without_quotes_and_a_file_that_is_not_there(file):
    file.write_text("since: 2025-05-01\nimport: false\n" + YAML)
    settings = read_watch(file)
    assert settings.since == "2025-05-01" and settings.import_ is False
    with pytest.raises(BadInput, match="There is no watch file"):
        read_watch(file.with_name("other.yaml"))


def test_the_files_in_the_documentation(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "digests.md").read_text(encoding="utf-8")
    example, workflow = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "watch.yaml").write_text(example)
    asked = queries(read_watch(tmp_path / "watch.yaml"))
    assert asked["Token pruning and merging"] == '(all:"token pruning" OR all:"token merging") AND cat:cs.CV'
    job = yaml.safe_load(workflow)["jobs"]["digest"]
    assert "vitkit papers watch watch.yaml" in [step.get("run") for step in job["steps"]]


def test_a_state_that_cannot_be_read(arxiv, file):
    file.with_name("watch.state.json").write_text("{}")
    with pytest.raises(BadInput, match=r"watch.state.json, cannot be read .*Remove the file"):
        run(file)
