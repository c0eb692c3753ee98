"""The pages that the documentation makes from the catalogue."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from vitkit.catalogue import load, methods
from vitkit.catalogue.reader import Entry, Method

SOURCE = Path(__file__).resolve().parents[2] / "docs" / "_ext" / "catalogue_pages.py"


@pytest.fixture(scope="module")
def extension():
    spec = importlib.util.spec_from_file_location("catalogue_pages", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(extension):
    return extension.pages()


def test_there_is_a_page_for_every_method_and_the_index_links_it(pages):
    assert {f"methods/{name}.md" for name in methods()} | {"methods.md", "papers.md", "settings.md"} == set(pages)
    for name in methods():
        assert f"](methods/{name}.md)" in pages["methods.md"]


def test_a_page_has_use_options_and_evidence(pages):
    page = pages["methods/sinkhorn.md"]
    assert 'vitkit.build("vit_pico", num_classes=10, normalizer="sinkhorn")' in page
    assert "$ vitkit study ./my-images --recipes vit,sinkhorn" in page
    assert re.search(r"\| `tau` \| `float` \| `1.0` \| τ, temperature", page)
    assert "(https://arxiv.org/abs/2504.16275)" in page
    assert "**In this experiment:** not shown." in page
    assert "**Departs from the paper:**" in page
    # the evidence is that of its paper, in whose table it stands
    assert re.search(r"^\| sinkhorn k=3 \|", page, re.MULTILINE)


def test_a_baseline_names_the_experiment_it_takes_part_in(pages):
    assert "From the experiment of [dymu](dymu.md)" in pages["methods/tome.md"]
    assert "[compared in dymu](methods/tome.md#evidence)" in pages["methods.md"]


def test_all_papers_are_listed_once_and_implemented_ones_are_marked(pages):
    page, done = pages["papers.md"], {m.entry.name for m in methods().values()}
    for entry in load().values():
        if entry.url:
            assert page.count(f"]({entry.url})") == 1, entry.name
    # two marks stand in the introduction's words
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert sum("✓" in row for row in rows) == len(done)


def test_the_keys_of_a_study_are_those_a_file_may_have(pages):
    from vitkit.study.settings import make_settings

    page = pages["settings.md"]
    assert re.search(r"^\| `from` \| `str \\\| null` \| `null` \| start from", page, re.MULTILINE)
    section = page.partition("## Protocol")[2].partition("## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `[^`]+` \| `([^`]*)`", section, re.MULTILINE)
    assert len(rows) > 15
    make_settings({"protocol": {key: {"null": None}.get(value, value) for key, value in rows}})


def test_prose_is_escaped_and_code_is_not(extension):
    assert extension.text("a_b < ``x_y < 1`` [0, 1)") == r"a\_b \< `x_y < 1` \[0, 1)"
    assert extension.text("see :func:`~vitkit.models.swap.swap`") == "see `swap`"
    assert extension.grid(["a"], [["`int | None`"]])[2] == r"| `int \| None` |"


def test_docstrings_keep_paragraphs_lists_and_examples(extension):
    def method():
        """What it is for.

        First ``x = 1``
        and more:

        - one
        - two

        >>> 1 + 1
        2

        Args:
            a: hidden here.

        Raises: BadInput if
            it is wrong.
        Paper: someone.
        """

    found = extension.docstring(method)
    assert found[""] == "First `x = 1`\nand more:\n\n- one\n- two\n\n```pycon\n>>> 1 + 1\n2\n```"
    assert found["Raises"] == "BadInput if it is wrong."


def test_a_method_that_cannot_be_imported_still_has_a_page(extension):
    entry = Entry(name="x", title="A title", kind="transform", summary="Does it.", provides=("no_such_package:f",))
    page = extension.method_page(Method(name="x", dotted="no_such_package:f", kind="transform", slot="", entry=entry))
    assert "Does it." in page and "Not usable where this page was made" in page and "None on file." in page


def test_pages_are_written_once_and_old_ones_removed(extension, tmp_path):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "gone.md").write_text("# gone")
    extension.write_pages(tmp_path)
    assert not (tmp_path / "methods" / "gone.md").exists()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.md")}
    extension.write_pages(tmp_path)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.md")}
