"""``vitkit papers import``: merge paper digests into the user's library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vitkit.catalogue.digests import Digest


def papers_import(
    files: Annotated[list[Path], typer.Argument(help="Digests: Markdown files with tables of papers.")],
    summarise: Annotated[
        bool, typer.Option("--summarise", help="Then summarise what is new, as `vitkit papers summarise` does.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Merge paper digests into your library, and say what was new and what could not be read.

    All files are merged together, or none if this is interrupted. It is an error if no row could be read.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from vitkit.catalogue.library import Library
    from vitkit.cli.console import print_json
    from vitkit.cli.papers_report import account, report
    from vitkit.cli.papers_summarise import summarise_merged

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
    if as_json:
        print_json(account(merged, notes, path))
    else:
        report(merged, notes, path)
    if summarise:
        with Library() as library:
            summarise_merged(library, merged)


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
