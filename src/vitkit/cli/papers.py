"""``vitkit papers``: the published systems of the catalogue, and the user's own library of papers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from vitkit.cli.papers_embed import papers_embed
from vitkit.cli.papers_export import papers_export
from vitkit.cli.papers_fetch import papers_fetch
from vitkit.cli.papers_import import papers_import
from vitkit.cli.papers_search import papers_search
from vitkit.cli.papers_serve import papers_serve
from vitkit.cli.papers_summarise import papers_summarise
from vitkit.cli.papers_watch import papers_watch

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, invoke_without_command=True)
app.command("import")(papers_import)
app.command("export")(papers_export)
app.command("fetch")(papers_fetch)
app.command("watch")(papers_watch)
app.command("search")(papers_search)
app.command("embed")(papers_embed)
app.command("serve")(papers_serve)
app.command("summarise")(papers_summarise)


@app.callback()
def papers(
    ctx: typer.Context,
    family: Annotated[str | None, typer.Option("--family", "-f", help="Only this family, e.g. compress.")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Only what no code comes with yet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the published systems of the catalogue; the commands keep a library of your own beside it."""
    if ctx.invoked_subcommand is not None:
        return
    from vitkit.catalogue import load
    from vitkit.errors import unknown

    entries = list(load().values())
    families = sorted({e.family for e in entries if e.family})
    if family is not None and family not in families:
        raise unknown("family", family, families, "vitkit papers")
    chosen = [e for e in entries if family in (None, e.family) and not (missing and e.provides)]
    if as_json:
        from vitkit.cli.console import print_json

        print_json([{**asdict(e), "url": e.url} for e in chosen])
        return
    from rich.text import Text

    from vitkit.cli.console import WIDE, console, table

    out = console()
    if not chosen:
        out.print("No entry matches.")
        return
    # a narrow window keeps the words and gives up what --json and --family tell as well
    extra = ["arXiv", "family", "kind", "code"] if out.width >= WIDE else ["arXiv"] if out.width >= 75 else []
    rows = table("name", *extra, "what it does", wrap="what it does")
    for entry in chosen:
        name = Text(entry.name, style="bold" if entry.provides else "")
        cells = [entry.id, entry.family, entry.kind, "✓" if entry.provides else ""]
        rows.add_row(name, *cells[: len(extra)], Text(entry.summary))
    out.print(rows)
    done = sum(bool(e.provides) for e in chosen)
    out.print(f"\n{len(chosen)} entries, {done} with code. Families: {', '.join(families)}.")
    out.print("`vitkit show NAME` tells more about one.")
