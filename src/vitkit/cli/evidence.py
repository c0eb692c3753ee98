"""``vitkit evidence``: run the small experiment behind a method's claim."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

#: labels up to this length stay on one line
_WHOLE = 32


def evidence(
    name: Annotated[str, typer.Argument(help="A method, an entry of the catalogue or an arXiv id.")],
    seeds: Annotated[str, typer.Option("--seeds", help="Whole numbers, separated by commas.")] = "0,1,2",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the result file; evidence/ of the project if not given.")
    ] = None,
) -> None:
    """Run the small experiment behind a method's claim, print its table and keep it as evidence/ARXIV-ID.json."""
    from vitkit.cli.console import console
    from vitkit.evidence.runner import run_evidence

    numbers = _seeds(seeds)
    screen = console()
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left:"))
    with Progress(*columns, TimeRemainingColumn(), console=screen, transient=True) as bar:
        task = bar.add_task(f"{name}: starting", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=f"{name}: {what}", completed=done, total=total)

        record, path = run_evidence(name, seeds=numbers, out=out, progress=progress)
    print_record(screen, record)
    screen.print(f"\nWritten to {path}", soft_wrap=True)


def print_record(screen: Any, record: dict[str, Any]) -> None:
    """The claim, whether it showed, and the table of an evidence file."""
    from rich.text import Text

    from vitkit.cli.console import table
    from vitkit.evidence import text

    screen.print(Text(f"Claim: {record['claim']}"))
    screen.print(Text(f"In this experiment: {text.verdict(record)}", style="bold"))
    columns, cells = text.table(record)
    rows = table(*columns)
    for column, figures, values in zip(rows.columns, text.numeric(record), zip(*cells)):
        # a wide table breaks between the words of its cells; cut cells would lose figures
        labels = not figures and not any("±" in v for v in values)
        column.no_wrap = labels and max(map(len, values)) <= _WHOLE
        column.justify = "right" if figures else "left"
    for row in cells:
        rows.add_row(*map(Text, row))
    screen.print(rows)
    if record.get("notes"):
        screen.print(Text(record["notes"]))
    screen.print(Text(text.conditions(record)))


def _seeds(text: str) -> tuple[int, ...]:
    from vitkit.errors import BadInput

    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise BadInput(f"--seeds {text!r} must be whole numbers separated by commas, like 0,1,2.") from error
    if len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise BadInput(f"--seeds {text!r} must be different numbers, none below zero.")
    return numbers
