"""``vitkit papers watch``: several queries to one digest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def papers_watch(
    file: Annotated[Path, typer.Argument(help="A YAML file with title, out, form and sections.")],
    summarise: Annotated[
        bool, typer.Option("--summarise", help="Summarise the papers, as `vitkit papers summarise` does.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the queries and ask nothing.")] = False,
) -> None:
    """Write a digest of the papers that several queries find, each query under its heading.

    Meant for a daily job: a digest has the papers that no earlier one had, and they go into your library. Nothing is
    written on a day without new ones.
    """
    from datetime import UTC, datetime

    from rich.text import Text

    from vitkit.catalogue import arxiv_feed
    from vitkit.catalogue.watch import queries, read_watch, watch
    from vitkit.cli.console import console, table
    from vitkit.cli.papers_report import count, counts, fetching_bar
    from vitkit.cli.papers_summarise import choose_writer
    from vitkit.cli.shell import EXIT_BUG, say

    settings = read_watch(file)
    if dry_run:
        for name, query in queries(settings).items():
            print(f"{name}: {query}")
        return
    writer = choose_writer(None, None) if summarise else None
    feed = arxiv_feed.Feed(delay_seconds=arxiv_feed.DELAY_SECONDS)
    with fetching_bar() as bar:
        task = bar.add_task("asking arXiv", total=None)
        watched = watch(
            file,
            settings,
            feed,
            datetime.now(UTC),
            lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
            writer=writer,
        )
    failed = [part for part in watched.parts if part.error]
    if len(failed) < len(watched.parts):
        rows = table("section", "found", "listed", "left out", wrap="section", right=("found", "listed", "left out"))
        for part in watched.parts:
            cells = ["–"] * 3 if part.error else [str(part.found), str(len(part.listed)), str(part.left_out or "")]
            rows.add_row(Text(part.name), *cells)
        out = console()
        out.print(rows)
        number = sum(len(part.listed) for part in watched.parts)
        if watched.out is None:
            out.print("\nNothing new.")
        else:
            out.print(Text(f"\n{count(number, 'paper')} written to {watched.out}."), soft_wrap=True)
        for reason in watched.unsummarised:
            out.print(f"Not summarised: {reason}", markup=False)
        if watched.merged is not None:
            out.print(f"Library: {counts(watched.merged)}")
    if not failed:
        return
    if len(failed) == len(watched.parts) and len({part.error for part in failed}) == 1:
        say(f"Error: {failed[0].error}")
    else:
        for part in failed:
            say(f"Error: section {part.name!r} could not be fetched. {part.error}")
    raise typer.Exit(EXIT_BUG)
