"""``vitkit papers search``: in the user's library and in the catalogue."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def papers_search(
    query: Annotated[list[str], typer.Argument(help='Words; "words in quotes" must stand side by side.')],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Papers to show.")] = 15,
    here: Annotated[bool, typer.Option("--here", help="Only those with code in vitkit.")] = False,
    words: Annotated[bool, typer.Option("--words", help="By words alone, though there are vectors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Find papers by title, abstract and summary: in your library, and in the catalogue that comes with vitkit.

    What vitkit has code for is marked and shown with the command that runs it. After `vitkit papers embed` papers that
    say the same in other words are found, too.
    """
    from vitkit.cli.console import console, print_json, table

    found = _search(" ".join(query), limit, here, words)
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


def _search(query: str, limit: int, here: bool, words: bool) -> list[dict[str, Any]]:
    from vitkit.catalogue.joined import catalogue_index, papers, search
    from vitkit.catalogue.library import Library
    from vitkit.catalogue.meaning import Vectors, have_vectors

    vectors = Vectors() if have_vectors() and not words else None

    with Library() as library, catalogue_index() as index:
        known = papers(library)
        # more than are shown, as some may be left out
        found = search(query, known, library, index, limit=len(known) if here else limit, vectors=vectors)
    return [
        {"arxiv_id": p.row.arxiv_id, "date": p.row.date, "title": p.row.title, "url": p.url, "run": p.run}
        for p in found
        if p.run or not here
    ][:limit]
