"""Surveys as tables: what they order their field by, and what stands for each cell here."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vitkit.catalogue.reader import Entry, find, load
from vitkit.errors import unknown

_TABLE = Path(__file__).with_name("taxonomies.toml")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One mechanism of a survey.

    Attributes:
        group: the survey's heading.
        name: the mechanism.
        recipes: what a study takes for it, as after ``--recipes``.
        python: ``"module:attribute"`` of what is used from Python.
        note: what to know; of an empty cell, that it is one.
    """

    group: str
    name: str
    recipes: tuple[str, ...] = ()
    python: tuple[str, ...] = ()
    note: str = ""


@lru_cache(maxsize=1)
def taxonomies() -> dict[str, tuple[Cell, ...]]:
    """Cells by the entry name of their survey, grouped as there."""
    with _TABLE.open("rb") as stream:
        raw = tomllib.load(stream)
    found = {}
    for survey, table in raw.items():
        cells = [
            Cell(
                group=row["group"],
                name=row["name"],
                recipes=tuple(row.get("recipes", ())),
                python=tuple(row.get("python", ())),
                note=row.get("note", ""),
            )
            for row in table["cells"]
        ]
        groups = list(dict.fromkeys(cell.group for cell in cells))
        found[survey] = tuple(sorted(cells, key=lambda cell: groups.index(cell.group)))
    return found


def taxonomy(survey: str) -> tuple[Entry, tuple[Cell, ...]]:
    """The cells of a survey, given by its entry's name, its arXiv id or its number in the reading list.

    Raises: UnknownName: no such survey, or a paper that is none.
    """
    tables = taxonomies()
    by_key = {key: entry.name for entry in load().values() if entry.name in tables for key in entry.keys}
    by_id = {load()[name].id: name for name in tables}
    name = by_key.get(survey) or by_id.get(survey) or survey
    if name not in tables:
        raise unknown("survey", survey, {**tables, **by_id}, "vitkit methods --taxonomy lightweight-vit-survey")
    return find(name)[0], tables[name]
