"""``vitkit papers summarise``: summaries for the papers of the library that have none."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vitkit.catalogue.digests import Row
    from vitkit.catalogue.library import Library, Merged
    from vitkit.catalogue.summaries import Writer

_ADDRESS, _MODEL = "OPENAI_BASE_URL", "VITKIT_SUMMARY_MODEL"
#: lines of an account that fit on a screen; --json has them all
_SHOWN = 50


def papers_summarise(
    section: Annotated[str | None, typer.Option("--section", "-s", help="Only papers under this heading.")] = None,
    since: Annotated[str | None, typer.Option("--since", help="Only papers from this day on, like 2025-03-27.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help=f"OpenAI-compatible endpoint that writes the summaries (or {_ADDRESS}).")
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"Model of the endpoint (or {_MODEL}).")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also papers that have a summary; it is replaced.")] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="At most so many, the newest first.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Summarise the papers of your library that have an abstract and no summary.

    Without an endpoint a summary consists of sentences of the abstract, and nothing leaves this machine. An endpoint
    gets title and abstract, and the key in OPENAI_API_KEY if there is one. Figures of a summary that are not in the
    abstract are marked at its end. Each summary is kept as soon as it is made; after an interrupt the same command
    goes on. It ends with code 1 if a paper got none.
    """
    from vitkit.catalogue.library import Library
    from vitkit.cli.papers_export import day

    first_day = day(since) if since is not None else ""
    writer = choose_writer(endpoint, model)
    with Library() as library:
        rows = library.papers(section, first_day)
        chosen = [row for row in rows if row.abstract and (again or not row.summary)][:limit]
        account = summarise_papers(library, chosen, writer, again)
        path = library.path
    if as_json:
        _print_json(account, str(path))
    else:
        _print(account, len(rows), sum(not row.abstract for row in rows), str(path))
    if account.failed:
        raise typer.Exit(1)


@dataclass
class Account:
    """What became of the papers: those with a new summary, and those without and why."""

    made: list[Row] = field(default_factory=list)
    failed: list[tuple[Row, str]] = field(default_factory=list)


def choose_writer(endpoint: str | None, model: str | None) -> Writer:
    """The endpoint that the options or the environment name, after saying on stderr where abstracts go.

    Args:
        endpoint: address, or None for that in ``OPENAI_BASE_URL``; if that is not set either, the writer is extractive.
        model: or None for that in ``VITKIT_SUMMARY_MODEL``.

    Raises: BadInput if an endpoint lacks its model, or a model its endpoint; MissingExtra.
    """
    from vitkit.catalogue.summaries import Endpoint, extractive
    from vitkit.errors import BadInput

    address = endpoint if endpoint is not None else os.environ.get(_ADDRESS, "").strip()
    if endpoint is None and not address:
        if model is not None:
            raise BadInput(f"--model {model} needs the endpoint it runs on: give --endpoint, or set {_ADDRESS}.")
        return extractive.write
    model = model or os.environ.get(_MODEL, "").strip()
    if not model:
        raise BadInput(f"Which model of the endpoint {address!r}? Give --model, or set {_MODEL}.")
    writer = Endpoint(address, model)
    print(f"Titles and abstracts are sent to {writer.address} (model {model}).", file=sys.stderr)
    return writer


def summarise_papers(library: Library, rows: Sequence[Row], writer: Writer, again: bool = False) -> Account:
    """Summarise papers of the library with a progress bar on stderr, keeping each summary as soon as it is made.

    Args: as for :func:`vitkit.catalogue.summaries.summarise`.

    Raises: VitkitError if the writer cannot go on; what was made is kept, and the message says how much.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vitkit.catalogue.summaries import summarise
    from vitkit.errors import VitkitError

    account = Account()

    def keep(row: Row) -> None:
        library.set_summary(row.arxiv_id, row.summary)
        account.made.append(row)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = Console(stderr=True)
    try:
        with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
            task = bar.add_task("summarising", total=None)
            summarise(
                rows,
                writer,
                lambda done, total: bar.update(task, completed=done, total=total),
                keep=keep,
                failed=lambda row, reason: account.failed.append((row, reason)),
                again=again,
            )
    except VitkitError as error:
        raise VitkitError(f"{error} {_kept(account, again)}") from error
    except KeyboardInterrupt:
        print(_kept(account, again), file=sys.stderr)
        raise
    return account


def summarise_merged(library: Library, merged: Merged) -> Account:
    """Summarise what an import brought, by the endpoint in the environment or without one, and say so on stderr.

    Raises: as :func:`choose_writer` and :func:`summarise_papers`; the import itself stays.
    """
    found = (library.find(arxiv_id) for arxiv_id in (*merged.new, *merged.updated))
    account = summarise_papers(library, [row for row in found if row is not None], choose_writer(None, None))
    failed = f", {len(account.failed)} papers got none: {account.failed[0][1]}" if account.failed else "."
    print(f"{len(account.made)} summaries made{failed}", file=sys.stderr)
    return account


def _kept(account: Account, again: bool) -> str:
    number = len(account.made)
    kept = "1 summary was made and is kept" if number == 1 else f"{number} summaries were made and are kept"
    return f"{kept}." if again else f"{kept}; the same command goes on from there."


def _print_json(account: Account, path: str) -> None:
    from vitkit.catalogue.summaries import figures
    from vitkit.cli.console import print_json

    print_json(
        {
            "library": path,
            "summarised": [
                {
                    "arxiv_id": row.arxiv_id,
                    "title": row.title,
                    "summary": row.summary,
                    "not_in_abstract": figures.marked(row.summary),
                }
                for row in account.made
            ],
            "failed": [
                {"arxiv_id": row.arxiv_id, "title": row.title, "reason": reason} for row, reason in account.failed
            ],
        }
    )


def _print(account: Account, papers: int, without_abstract: int, path: str) -> None:
    from rich.text import Text

    from vitkit.catalogue.summaries import figures
    from vitkit.cli.console import console, table

    out = console()
    marked = [(row, missing) for row in account.made if (missing := figures.marked(row.summary))]
    if account.made or account.failed:
        out.print(
            f"{len(account.made)} summaries made, {len(marked)} of them marked for figures that are not in the "
            f"abstract; {len(account.failed)} papers got none."
        )
    else:
        out.print(f"Nothing to do: of {papers} papers {without_abstract} have no abstract, the others have a summary.")
    out.print(Text(f"Library: {path}"), soft_wrap=True)
    for header, lines in (
        ("not in the abstract", [(row, ", ".join(missing)) for row, missing in marked]),
        ("no summary because", account.failed),
    ):
        if not lines:
            continue
        rows = table("paper", header, wrap=header)
        for row, words in lines[:_SHOWN]:
            rows.add_row(row.arxiv_id, Text(words))
        out.print()
        out.print(rows)
        if len(lines) > _SHOWN:
            out.print(f"… and {len(lines) - _SHOWN} more; --json lists them all.")
