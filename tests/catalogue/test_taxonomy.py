"""Every cell of a survey names something that exists, or says that it is empty."""

import importlib
import json

import pytest
from typer.testing import CliRunner

from vitkit.catalogue.taxonomy import taxonomies, taxonomy
from vitkit.errors import UnknownName

CELLS = [(survey, cell) for survey, cells in taxonomies().items() for cell in cells]


@pytest.mark.parametrize("survey, cell", CELLS, ids=[f"{s}-{c.name}" for s, c in CELLS])
def test_cell(survey, cell):
    import timm

    from vitkit.catalogue import methods
    from vitkit.study.recipe import parse
    from vitkit.study.trial import check_values

    assert cell.recipes or cell.python or cell.note
    for text in cell.recipes:
        recipe = parse(text)
        known = recipe.base == "auto" or timm.is_model(recipe.base)
        assert known or recipe.base in methods()
        if recipe.parts:
            check_values(recipe)
    for dotted in cell.python:
        module, _, attribute = dotted.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))


def test_found_by_name_id_and_key():
    for name in ("lightweight-vit-survey", "2505.03113", "47"):
        entry, cells = taxonomy(name)
        assert entry.id == "2505.03113" and len({c.group for c in cells}) > 3
    with pytest.raises(UnknownName, match="lightweight-vit-survey"):
        taxonomy("lightweight-vit-surve")


def test_no_mechanism_of_the_mamba_survey_is_missing():
    empty = [cell.name for cell in taxonomies()["vision-mamba-remote-sensing"] if not cell.recipes and not cell.python]
    assert not empty


def test_printed():
    from vitkit.cli import app

    out = CliRunner().invoke(app, ["methods", "--taxonomy", "58", "--json"])
    data = json.loads(out.output)
    assert data["survey"] == "vision-mamba-remote-sensing" and data["cells"][0]["group"] == "foundation"
    text = CliRunner().invoke(app, ["methods", "-t", "vision-mamba-remote-sensing"]).output
    assert "vim:order=score" in text
