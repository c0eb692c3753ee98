"""The table itself: complete, true to its sources, and every name in it resolves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vitkit.catalogue import KINDS, find, load, methods, resolve
from vitkit.catalogue.reader import SLOTS

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ROOT.parent / "shared" / "systems.json"
FIRST_TWELVE = [
    "charm",
    "loope",
    "qdsformer",
    "dct-attention",
    "kan",
    "token-graying",
    "defect-mae",
    "zsharp",
    "gptaq",
    "dymu",
    "gmar",
    "et-deepfool",
    "softmax-rejection",
]
BASES = ["tome", "mae", "gptq", "rtn", "rollout", "grad-cam", "fgsm", "pgd", "sam", "asam", "friendly-sam", "adamw"]


def listed():
    return [e for e in load().values() if e.keys]


def test_there_are_219_systems_and_every_key_stands_once():
    keys = [k for e in listed() for k in e.keys]
    assert len(listed()) == 219
    assert len(keys) == len(set(keys)) == 221
    ids = [e.id for e in load().values() if e.id]
    assert len(ids) == len(set(ids))


def test_names_are_slugs_that_can_be_modules():
    for name in load():
        assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name), name
    assert set(FIRST_TWELVE + BASES) <= set(load())


def test_every_entry_is_filled_in():
    for entry in load().values():
        assert entry.kind in KINDS
        assert (entry.slot in SLOTS) if entry.kind == "part" else entry.slot == ""
        assert entry.title and entry.family
        if entry.id:
            assert entry.date == f"20{entry.id[:2]}-{entry.id[2:4]}"
        assert entry.code == "" or entry.code.startswith(("https://", "http://"))


def test_summaries_are_one_line_each_and_no_two_alike():
    summaries = [e.summary for e in load().values()]
    assert len(set(summaries)) == len(summaries)
    for text in summaries:
        assert 30 <= len(text) <= 140 and "\n" not in text and text.endswith("."), text


def test_the_two_papers_listed_twice_keep_all_keys_and_the_newest_version():
    gptaq, knee = load()["gptaq"], load()["sam-knee-mri"]
    assert (set(gptaq.keys), gptaq.version) == ({"7", "199"}, "v3")
    assert gptaq.title.startswith("GPTAQ")
    assert (set(knee.keys), knee.version) == ({"88", "123"}, "v3")


@pytest.mark.skipif(not SYSTEMS.exists(), reason="needs the reading list beside the project")
def test_the_table_agrees_with_the_reading_list():
    by_key = {k: e for e in listed() for k in e.keys}
    rows = json.loads(SYSTEMS.read_text(encoding="utf-8"))
    assert {r["key"] for r in rows} == set(by_key)
    for row in rows:
        entry = by_key[row["key"]]
        bare, _, version = row["id"].partition("v")
        assert entry.id == bare
        assert entry.family == row["family"]
        if f"v{version}" == entry.version or not version:
            assert entry.title == row["title"]
            assert entry.code == row["code"] or len(entry.keys) > 1


@pytest.mark.skipif(not SYSTEMS.exists(), reason="needs the reading list beside the project")
def test_summaries_are_not_copied_from_the_abstracts():
    by_key = {k: e for e in listed() for k in e.keys}
    for row in json.loads(SYSTEMS.read_text(encoding="utf-8")):
        summary, abstract = (re.findall(r"[a-z0-9]+", t.lower()) for t in (by_key[row["key"]].summary, row["abstract"]))
        text = f" {' '.join(abstract)} "
        for i in range(len(summary) - 6):
            run = " ".join(summary[i : i + 7])
            assert f" {run} " not in text, (row["key"], run)


@pytest.mark.parametrize("name", list(methods()))
def test_every_method_resolves(name):
    assert resolve(name) is methods()[name].load()
    assert find(name)[1] == [methods()[name]]


def test_methods_and_entries_do_not_contradict_each_other():
    # one word must not mean two things: a method named like an entry belongs to that entry
    for name, method in methods().items():
        if name in load():
            assert method.entry.name == name


def test_evidence_named_in_the_table_exists():
    for entry in load().values():
        if entry.evidence:
            # baselines have no experiment of their own: theirs is the one they are compared in
            if entry.family != "base":
                assert entry.evidence == f"evidence/{entry.id or entry.name}.json"
            assert (ROOT / entry.evidence).is_file(), entry.name
