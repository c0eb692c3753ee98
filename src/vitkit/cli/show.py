"""``vitkit show``: everything about one method or paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vitkit.catalogue import Entry, Method


def show(name: Annotated[str, typer.Argument(help="A method, an entry of the catalogue or an arXiv id.")]) -> None:
    """Explain a method or paper: what it is, how to use it, its options, its paper and its evidence."""
    from rich.text import Text

    from vitkit.catalogue import find
    from vitkit.catalogue.describe import kinds
    from vitkit.cli.console import console

    entry, meant = find(name)
    out = console()
    title = meant[0].name if len(meant) == 1 else entry.name
    out.print(Text(title, style="bold"), Text(f"· {kinds(entry, meant)}"))
    out.print(Text(entry.summary))
    for method in meant:
        _show_method(out, method, alone=len(meant) == 1)
    if not meant:
        out.print(Text("\nNo code comes with it yet; `vitkit methods` lists what can be used."))
    _show_paper(out, entry)
    _show_evidence(out, entry)


def _show_method(out: Any, method: Method, alone: bool) -> None:
    from rich.text import Text

    from vitkit.catalogue.describe import NETWORK_DEFAULTS, describe
    from vitkit.cli.console import table
    from vitkit.errors import VitkitError

    if not alone:
        out.print(Text(f"\n{method.name}", style="bold"), Text(f"· {method.kind}"))
    try:
        about = describe(method)
    except VitkitError as error:
        # a missing extra must not hide the paper and the evidence
        out.print(Text(f"\nNot usable here: {error}"))
        return
    if about.purpose:
        out.print(Text(about.purpose))
    for title, lines in (("In Python", about.python), ("In a study", about.study)):
        if lines:
            out.print(Text(f"\n{title}", style="bold"))
        for line in lines:
            out.print(Text(f"  {line}"), soft_wrap=True)
    out.print(Text("\nOptions", style="bold"))
    if not about.options:
        out.print("  none")
        return
    shown = table("option", "type", "default", "meaning", wrap="meaning")
    for option in about.options:
        shown.add_row(*(Text(v) for v in (option.name, option.type, option.default, option.meaning)))
    out.print(shown)
    if method.kind == "backbone":
        out.print(Text(NETWORK_DEFAULTS))


def _show_paper(out: Any, entry: Entry) -> None:
    from rich.text import Text

    out.print(Text("\nPaper", style="bold"))
    date = f" ({entry.date})" if entry.date else ""
    out.print(Text(f"  {entry.title}{date}"))
    for line in (entry.url, entry.code and f"code: {entry.code}"):
        if line:
            out.print(Text(f"  {line}"), soft_wrap=True)
    if entry.source != "vitkit":
        out.print(Text(f"  listed by {entry.source}"))


def _show_evidence(out: Any, entry: Entry) -> None:
    from rich.text import Text

    from vitkit.cli.evidence import print_record
    from vitkit.evidence.runner import has_experiment, read_evidence

    record = read_evidence(entry)
    if record:
        whose = "" if record.get("name", entry.name) == entry.name else f" (compared in {record['name']})"
        out.print(Text(f"\nEvidence{whose}", style="bold"))
        print_record(out, record)
    elif has_experiment(entry):
        out.print(Text(f"\nEvidence: none on file; `vitkit evidence {entry.name}` runs the experiment."))
    elif entry.provides:
        out.print(Text("\nEvidence: none on file."))
