"""``vitkit papers import``: merge paper digests into the user's library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vitkit.catalogue.digests import Digest
    from vitkit.catalogue.library import Merged

#: lines of an account that fit on a screen; --json has them all
_SHOWN = 50


def papers_import(
    files: Annotated[list[Path], typer.Argument(help="Digests: Markdown files with tables of papers.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Merge paper digests into your library, and say what was new and what could not be read.

    All files are merged together, or none if this is interrupted. It is an error if no row could be read.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from vitkit.catalogue.library import Library

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    # on stderr, which leaves the output to programs
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("reading", total=len(files))
        digests = []
        for file in files:
            digests.append(_read(file))
            bar.advance(task)
        _require_rows(digests)
        with Library() as library:
            bar.reset(task, description="merging")
            merged = library.merge(*digests, progress=lambda done, total: bar.update(task, completed=done, total=total))
            path = library.path
    notes = [(f"{note.source}:{note.line}", note.reason) for digest in digests for note in digest.notes]
    notes += [
        (f"{row.source}:{row.line}", f"{row.versioned_id} is listed a second time; this row counts")
        for row in merged.repeated
    ]
    listed = _in_catalogue([*merged.new, *merged.updated, *merged.known])
    if as_json:
        _print_json(merged, notes, listed, path)
    else:
        _print(merged, notes, listed, path)


def _read(file: Path) -> Digest:
    from vitkit.catalogue.digests import Digest, Unreadable, read_file
    from vitkit.errors import BadInput

    try:
        return read_file(file)
    except BadInput as error:
        # the other files must not suffer from it
        return Digest(source=str(file), unreadable=(Unreadable(source=str(file), line=0, reason=str(error)),))


def _require_rows(digests: list[Digest]) -> None:
    from vitkit.errors import BadInput

    if any(digest.rows for digest in digests):
        return
    first = next(unreadable for digest in digests for unreadable in digest.unreadable)
    reason = first.reason if not first.line else f"{first.source}, line {first.line}: {first.reason}."
    if len(digests) == 1 and not first.line:
        raise BadInput(reason)
    number = sum(len(digest.unreadable) for digest in digests)
    what = f"None of the {len(digests)} files" if len(digests) > 1 else f"None of the {number} rows of {first.source}"
    raise BadInput(f"{what} could be read, to begin with {reason} The library is as it was.")


def _in_catalogue(ids: Iterable[str]) -> dict[str, str]:
    """arXiv id -> name of its entry, for the papers that the catalogue knows."""
    from vitkit.catalogue import load

    names = {entry.id: entry.name for entry in load().values() if entry.id}
    return {arxiv_id: names[arxiv_id] for arxiv_id in ids if arxiv_id in names}


def _print_json(merged: Merged, notes: list[tuple[str, str]], listed: dict[str, str], path: Path) -> None:
    from dataclasses import asdict

    from vitkit.cli.console import print_json

    print_json(
        {
            "library": str(path),
            "rows": merged.rows,
            "new": merged.new,
            "updated": merged.updated,
            "known": merged.known,
            "in_catalogue": listed,
            "unreadable": [asdict(unreadable) for unreadable in merged.unreadable],
            "notes": [{"where": where, "what": what} for where, what in notes],
        }
    )


def _print(merged: Merged, notes: list[tuple[str, str]], listed: dict[str, str], path: Path) -> None:
    from rich.text import Text

    from vitkit.cli.console import console

    out = console()
    papers = len(merged.new) + len(merged.updated) + len(merged.known)
    number = len(merged.unreadable)
    lost = f"{number} could not be read, see below." if number else "All rows were read."
    out.print(
        f"{_count(merged.rows, 'row')} of {_count(papers, 'paper')}: {len(merged.new)} new, "
        f"{len(merged.updated)} updated, {len(merged.known)} already known. {lost}"
    )
    if listed:
        out.print(f"{len(listed)} of the papers are in the catalogue: `vitkit show ARXIV-ID` tells how to use one.")
    out.print(Text(f"Library: {path}"), soft_wrap=True)
    unreadable = [(f"{u.source}:{u.line}" if u.line else u.source, u.reason) for u in merged.unreadable]
    _print_lines(out, "not read", "reason", unreadable)
    _print_lines(out, "note", "what", notes)


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


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
