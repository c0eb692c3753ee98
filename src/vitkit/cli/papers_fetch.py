"""``vitkit papers fetch``: take papers from arXiv into the user's library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from datetime import datetime

    from vitkit.catalogue.library import Merged


def papers_fetch(
    query: Annotated[
        str,
        typer.Option("--query", "-q", help='Words side by side, "phrases" and words, or arXiv\'s own: ti:, AND, OR …'),
    ] = "",
    since: Annotated[
        str | None,
        typer.Option(
            "--since", help="Papers submitted from then on: 2025-05-01, 7d. Default: the query's first fetch, else 7d."
        ),
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option("--category", "-c", help="In this category, e.g. cs.CV; repeatable.")
    ] = None,
    section: Annotated[
        str | None, typer.Option("--section", "-s", help="Heading in the library; the query if not given.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="Papers to ask for; the next fetch goes on there.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Ask for what has arrived as well, e.g. for newer versions.")
    ] = False,
    summarise: Annotated[
        bool, typer.Option("--summarise", help="Then summarise what is new, as `vitkit papers summarise` does.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Fetch papers from arXiv into your library, the newest first, and say what was new.

    Every page is kept as it arrives. The same command goes on where an interrupted one stopped, and later asks for what
    is new. Links to code are taken from abstracts and comments.
    """
    from datetime import UTC, datetime

    from vitkit.catalogue import arxiv_feed
    from vitkit.catalogue.digests.row import tidy
    from vitkit.catalogue.fetches import Fetch, combine
    from vitkit.catalogue.library import Library
    from vitkit.cli.console import print_json
    from vitkit.cli.papers_report import account, fetching_bar
    from vitkit.cli.papers_summarise import summarise_merged
    from vitkit.cli.shell import EXIT_BUG, say

    now = datetime.now(UTC)
    categories = category or []
    asked = arxiv_feed.build_query(query, categories)
    fetch = Fetch(
        asked,
        tidy(section if section is not None else query or ", ".join(categories)),
        now,
        since=None if since is None else arxiv_feed.parse_since(since, now),
        again=again,
    )
    feed = arxiv_feed.Feed(delay_seconds=arxiv_feed.DELAY_SECONDS)
    parts: list[Merged] = []
    done = 0
    failure: BaseException | None = None
    try:
        with fetching_bar() as bar:
            task = bar.add_task("asking arXiv", total=None)
            for step in fetch.run(feed, limit):
                parts.append(step.merged)
                done += step.merged.rows
                total = done + step.left if limit is None else min(limit, done + step.left)
                bar.update(task, description="fetching", completed=done, total=total)
    except (Exception, KeyboardInterrupt) as error:
        failure = error
    merged = combine(parts)
    if as_json:
        if parts or failure is None:
            print_json({**account(merged, [], fetch.path), "query": asked, "complete": failure is None})
    elif parts or failure is None:
        _print(merged, asked, fetch.since, fetch.path)
    if summarise and parts and not isinstance(failure, KeyboardInterrupt):
        with Library() as library:
            summarise_merged(library, merged)
    if failure is None:
        return
    if parts:
        say("What has arrived is in the library; the same command fetches the rest.")
    if isinstance(failure, arxiv_feed.Unreachable):
        # a machine that is offline is no mistake of the user's
        say(f"Error: {failure}")
        raise typer.Exit(EXIT_BUG)
    raise failure


def _print(merged: Merged, asked: str, since: datetime, path: Path) -> None:
    from vitkit.cli.papers_report import report

    if merged.rows or merged.unreadable:
        report(merged, [], path)
    else:
        print(f"arXiv has nothing more for {asked} since {since:%Y-%m-%d}.")
