"""``vitkit papers search``: in the user's library and in the catalogue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vitkit.catalogue.digests import Row


def papers_search(
    query: Annotated[list[str], typer.Argument(help='Words; "words in quotes" must stand side by side.')],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Papers to show.")] = 15,
    here: Annotated[bool, typer.Option("--here", help="Only those with code in vitkit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Find papers by title, abstract and summary: in your library, and in the catalogue that comes with vitkit.

    What vitkit has code for is marked and shown with the command that runs it.
    """
    from vitkit.cli.console import console, print_json, table

    found = _search(" ".join(query), limit, here)
    if as_json:
        print_json(found)
        return
    out = console()
    if not found:
        out.print("No paper matches; try fewer words.")
        return
    from rich.text import Text

    rows = table("paper", "date", "title", "run it", wrap="title")
    for hit in found:
        style = "bold" if hit["run"] else ""
        rows.add_row(hit["arxiv_id"], hit["date"], Text(hit["title"], style=style), Text(hit["run"]))
    out.print(rows)


def _search(query: str, limit: int, here: bool) -> list[dict[str, Any]]:
    """Hits of the library, then those of the catalogue that the library does not have."""
    from vitkit.catalogue import load
    from vitkit.catalogue.digests import Digest, Row
    from vitkit.catalogue.library import Library

    entries = {entry.id: entry for entry in load().values() if entry.id}
    shipped = [Row(arxiv_id=e.id, title=e.title, date=e.date, summary=e.summary) for e in entries.values()]
    # more than are shown, as some may be left out
    enough = limit if not here else 100 * limit
    with Library() as library, Library(":memory:") as catalogue:
        catalogue.merge(Digest(rows=tuple(shipped)))
        rows: dict[str, Row] = {}
        for source in (library, catalogue):
            for hit in source.search(query, enough):
                rows.setdefault(hit.row.arxiv_id, hit.row)
    found = []
    for row in rows.values():
        entry = entries.get(row.arxiv_id)
        run = f"vitkit show {entry.name}" if entry is not None and entry.provides else ""
        if run or not here:
            found.append(
                {"arxiv_id": row.arxiv_id, "date": row.date, "title": row.title, "url": row.url, "run": run}
            )  # fmt: skip
    return found[:limit]
