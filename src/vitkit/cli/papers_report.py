"""What the verbs that fill the library say they did."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from vitkit.catalogue.library import Merged

#: lines of an account that fit on a screen; --json has them all
_SHOWN = 50


def account(merged: Merged, notes: list[tuple[str, str]], path: Path) -> dict[str, Any]:
    """For programs.

    Args:
        notes: where, and what is to be said of it.
        path: of the library.
    """
    return {
        "library": str(path),
        "rows": merged.rows,
        "new": merged.new,
        "updated": merged.updated,
        "known": merged.known,
        "in_catalogue": _in_catalogue(merged),
        "unreadable": [asdict(unreadable) for unreadable in merged.unreadable],
        "notes": [{"where": where, "what": what} for where, what in notes],
    }


def report(merged: Merged, notes: list[tuple[str, str]], path: Path) -> None:
    """For people: counts, and tables of what could not be read and of the notes.

    Args: as for :func:`account`.
    """
    from rich.text import Text

    from vitkit.cli.console import console

    out = console()
    number = len(merged.unreadable)
    lost = f"{number} could not be read, see below." if number else "All rows were read."
    out.print(f"{counts(merged)} {lost}")
    if listed := _in_catalogue(merged):
        out.print(f"{len(listed)} of the papers are in the catalogue: `vitkit show ARXIV-ID` tells how to use one.")
    out.print(Text(f"Library: {path}"), soft_wrap=True)
    unreadable = [(f"{u.source}:{u.line}" if u.line else u.source, u.reason) for u in merged.unreadable]
    _print_lines(out, "not read", "reason", unreadable)
    _print_lines(out, "note", "what", notes)


def counts(merged: Merged) -> str:
    """One sentence."""
    papers = len(merged.new) + len(merged.updated) + len(merged.known)
    return (
        f"{count(merged.rows, 'row')} of {count(papers, 'paper')}: {len(merged.new)} new, "
        f"{len(merged.updated)} updated, {len(merged.known)} already known."
    )


def count(number: int, what: str) -> str:
    """``"1 row"``, ``"2 rows"``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def fetching_bar() -> Progress:
    """A bar with counts and the time left, on a terminal only."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # on stderr, which leaves the output to programs
    screen = Console(stderr=True)
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, *times, console=screen, transient=True, disable=not screen.is_terminal)


def _in_catalogue(merged: Merged) -> dict[str, str]:
    """arXiv id -> name of its entry, for the papers that the catalogue knows."""
    from vitkit.catalogue import load

    names = {entry.id: entry.name for entry in load().values() if entry.id}
    return {i: names[i] for i in (*merged.new, *merged.updated, *merged.known) if i in names}


def _print_lines(out: Any, where: str, what: str, lines: list[tuple[str, str]]) -> None:
    from rich.text import Text

    from vitkit.catalogue.digests.row import tidy
    from vitkit.cli.console import table

    if not lines:
        return
    rows = table(where, what, wrap=what)
    # a long path would leave no room for the reason
    rows.columns[0].no_wrap = False
    for place, reason in lines[:_SHOWN]:
        rows.add_row(Text(tidy(place)), Text(tidy(reason)))
    out.print()
    out.print(rows)
    if len(lines) > _SHOWN:
        out.print(f"… and {len(lines) - _SHOWN} more; --json lists them all.")
