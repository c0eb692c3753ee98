"""What papers, methods, show and evidence print."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vitkit.catalogue import clear_cache, load, reader
from vitkit.catalogue.reader import Entry
from vitkit.cli.shell import app
from vitkit.evidence import runner as evidence_runner

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture
def catalogue(monkeypatch):
    """Replace the catalogue by a few entries with known contents."""

    def install(**rows):
        entries = {n: Entry(name=n, **row) for n, row in rows.items()}
        clear_cache()
        monkeypatch.setattr(reader, "_entries", lambda table, source: dict(entries))
        monkeypatch.setattr(reader, "_third_parties", list)

    yield install
    monkeypatch.undo()
    clear_cache()


HALVER = {
    "title": "Halving",
    "kind": "transform",
    "summary": "Halves a model.",
    "id": "2601.00001",
    "family": "compress",
    "provides": ("calendar:isleap",),
}
WISH = {"title": "A wish", "kind": "recipe", "summary": "Not there yet.", "family": "studies"}


def test_papers_lists_all_with_their_summaries():
    done = run("papers")
    assert done.exit_code == 0
    assert f"{len(load())} entries" in done.output
    assert "2504.02692" in done.output


def test_papers_filters_by_family_and_missing(catalogue):
    catalogue(halver=HALVER, wish=WISH)
    assert "halver" in run("papers", "--family", "compress").output
    assert "wish" not in run("papers", "--family", "compress").output
    missing = json.loads(run("papers", "--missing", "--json").output)
    assert [row["name"] for row in missing] == ["wish"]
    assert "No entry matches" in run("papers", "--family", "compress", "--missing").output


@pytest.mark.parametrize("width", ["60", "80", "120"])
def test_papers_fits_the_window(width):
    done = runner.invoke(app, ["papers"], env={"COLUMNS": width})
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= int(width)
    # the summary keeps a readable share of the window
    assert int(width) - lines[0].index("what it") >= 20


def test_papers_json_has_every_field():
    rows = json.loads(run("papers", "--json", "--family", "compress").output)
    by_name = {row["name"]: row for row in rows}
    assert by_name["gptaq"]["url"] == "https://arxiv.org/abs/2504.02692"
    assert by_name["gptaq"]["keys"] == ["7", "199"]


def test_an_unknown_family_suggests_one():
    done = run("papers", "--family", "compres")
    assert done.exit_code == 2 and "Did you mean 'compress'" in done.stderr


def test_methods_filters_by_kind(catalogue):
    catalogue(halver=HALVER, wish=WISH)
    assert "calendar" in run("methods").output
    assert "wish" not in run("methods").output
    rows = json.loads(run("methods", "--kind", "transform", "--json").output)
    assert [(r["name"], r["kind"], r["provides"]) for r in rows] == [("calendar", "transform", "calendar:isleap")]
    assert "No method matches" in run("methods", "--kind", "part").output


def test_an_unknown_kind_suggests_one():
    done = run("methods", "--kind", "transfrom")
    assert done.exit_code == 2 and "Did you mean 'transform'" in done.stderr


@pytest.mark.parametrize("name", ["calendar", "halver", "2601.00001", "arXiv:2601.00001v2"])
def test_show_tells_usage_options_and_paper(catalogue, name):
    catalogue(halver=HALVER)
    text = run("show", name).output
    for part in (
        "Halves a model.",
        "from calendar import isleap",
        "smaller, change = isleap(year=…)",
        "vitkit study ./my-images --recipes vit,calendar",
        "required",
        "https://arxiv.org/abs/2601.00001",
        "Evidence: none on file.",
    ):
        assert part in text, part
    assert "vitkit evidence" not in text  # there is no experiment to run


def test_show_of_a_part_names_the_slot(catalogue):
    catalogue(gate={**HALVER, "kind": "part", "slot": "mixer"})
    assert 'vitkit.build("vit_pico", num_classes=10, mixer=("calendar", {"year": …}))' in run("show", "gate").output


def test_show_without_code_still_shows_the_paper(catalogue):
    catalogue(wish=WISH)
    text = run("show", "wish").output
    assert "No code comes with it yet" in text and "A wish" in text


def test_show_survives_a_method_that_cannot_be_imported(catalogue):
    catalogue(halver={**HALVER, "provides": ("no_such_package:f",)})
    done = run("show", "halver")
    assert done.exit_code == 0
    assert "Not usable here" in done.output and "Halving" in done.output


def test_show_prints_the_evidence_on_file(catalogue, tmp_path, monkeypatch):
    catalogue(halver=HALVER)
    monkeypatch.setattr(evidence_runner, "_project_folder", lambda: tmp_path)
    record = {
        "claim": "Half is enough.",
        "shown": False,
        "rows": [{"arm": "half", "accuracy": 0.51234567, "ok": True, "note": None}],
        "notes": "Small data.",
        "settings": {"epochs": 3},
        "seeds": [0, 1],
        "duration_s": 12.3,
        "machine": {"cpu": "abacus"},
    }
    (tmp_path / "2601.00001.json").write_text(json.dumps(record))
    text = run("show", "halver").output
    for part in ("Half is enough.", "not shown", "0.5123", "yes", "–", "epochs=3", "0, 1", "12 s on abacus"):
        assert part in text, part


def test_a_baseline_shows_the_evidence_it_is_compared_in():
    text = run("show", "tome").output
    assert "Evidence (compared in dymu)" in text and "Claim: Merging by learned thresholds" in text


def test_the_commands_of_show_can_be_used_as_they_stand():
    from vitkit.catalogue.describe import describe
    from vitkit.catalogue.reader import methods
    from vitkit.study.recipe import check_options, parse

    for method in methods().values():
        for line in describe(method).study:
            recipes = line.rpartition(" ")[2].split(",")
            assert recipes[0] == "vit"
            recipe = parse(recipes[1])
            check_options(recipe)
            uses = [*recipe.parts, *recipe.objectives, *recipe.transforms, *recipe.probes, recipe.optimizer]
            for use in filter(None, uses):
                for option in describe(method).options:
                    value = use.options.get(option.name)
                    assert value is None or repr(value) == option.default, (line, value)


def test_a_damaged_evidence_file_is_named(catalogue, tmp_path, monkeypatch):
    catalogue(halver=HALVER)
    monkeypatch.setattr(evidence_runner, "_project_folder", lambda: tmp_path)
    (tmp_path / "2601.00001.json").write_text("{")
    done = run("show", "halver")
    assert done.exit_code == 2 and "2601.00001.json is damaged" in done.stderr


@pytest.mark.parametrize(("seeds", "message"), [("a", "whole numbers"), ("0,0", "different"), ("-1", "below zero")])
def test_bad_seeds_are_explained(seeds, message):
    done = run("evidence", "gptaq", "--seeds", seeds)
    assert done.exit_code == 2 and message in done.stderr


def test_evidence_without_an_experiment_lists_those_that_have_one(catalogue):
    catalogue(halver=HALVER)
    done = run("evidence", "halver")
    assert done.exit_code == 2 and "'halver' has no experiment yet" in done.stderr
