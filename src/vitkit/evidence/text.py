"""An evidence file in words, the same in the terminal and in the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def verdict(record: Mapping[str, Any]) -> str:
    """Whether the claim showed in the experiment.

    >>> verdict({"shown": None})
    'undecided'
    """
    return {True: "shown", False: "not shown", None: "undecided"}[record["shown"]]


def table(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table.

    >>> table({"rows": [{"arm": "ToMe", "mean_tokens": 12.34567, "kept": None}]})
    (['arm', 'mean tokens', 'kept'], [['ToMe', '12.35', '–']])
    """
    columns = list(record["rows"][0])
    return [c.replace("_", " ") for c in columns], [[cell(row[c]) for c in columns] for row in record["rows"]]


def numeric(record: Mapping[str, Any]) -> list[bool]:
    """For each column whether all its cells are numbers, to be set flush right."""
    return [all(isinstance(row[c], (int, float)) for row in record["rows"]) for c in record["rows"][0]]


def cell(value: Any) -> str:
    """One value: four digits of a number, a dash for nothing.

    >>> cell(0.123456), cell(True), cell(None)
    ('0.1235', 'yes', '–')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def conditions(record: Mapping[str, Any]) -> str:
    """Settings, seeds, duration and machine, as one paragraph."""
    settings = ", ".join(f"{k}={v}" for k, v in record.get("settings", {}).items())
    seeds = ", ".join(map(str, record["seeds"]))
    took = f"{record['duration_s']:.0f} s on {record['machine']['cpu']}"
    return f"Settings: {settings or 'none'}. Seeds: {seeds}. {took}."
