"""``vitkit papers export``: write the library as a digest, or for other programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def papers_export(
    form: Annotated[str, typer.Option("--form", "-f", help="table, daily, bibtex, json or csv.")] = "table",
    section: Annotated[str | None, typer.Option("--section", "-s", help="Only rows under this heading.")] = None,
    since: Annotated[str | None, typer.Option("--since", help="Only rows from this day on, like 2025-03-27.")] = None,
    newest: Annotated[
        bool, typer.Option("--newest", help="Each paper once, with all that is known of its newest version.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; stdout if not given.")] = None,
) -> None:
    """Write your library as a digest in either form, as BibTeX, JSON or CSV.

    Without --newest the rows are those of the imported digests, older versions too, so that an exported digest has the
    table that was imported. BibTeX always has each paper once.
    """
    from vitkit.catalogue.digests import FORMS, write
    from vitkit.catalogue.library import Library
    from vitkit.errors import BadInput, unknown
    from vitkit.files import write_text

    if form not in FORMS:
        raise unknown("form of a digest", form, FORMS, "vitkit papers export --help")
    first_day = day(since) if since is not None else ""
    with Library() as library:
        if newest or form == "bibtex":
            rows = library.papers(section, first_day)
        else:
            rows = library.rows(section, first_day)
        if not rows and section is None and not first_day:
            raise BadInput(f"The library {library.path} is still empty: `vitkit papers import FILE` fills it.")
    text = write(rows, form)
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
    if out is not None or not rows:
        # on stderr, which leaves the output to programs
        print(f"{len(rows)} rows written to {out}." if rows and out else "No row matches.", file=sys.stderr)


def day(text: str) -> str:
    from datetime import date

    from vitkit.errors import BadInput

    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise BadInput(f"--since {text!r} must be a day like 2025-03-27.") from error
