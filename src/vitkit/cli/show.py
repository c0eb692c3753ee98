"""``vitkit show``: everything about one method or paper."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vitkit.catalogue import Entry, Method
    from vitkit.catalogue.options import Option


def show(name: Annotated[str, typer.Argument(help="A method, an entry of the catalogue or an arXiv id.")]) -> None:
    """Explain a method or paper: what it is, how to use it, its options, its paper and its evidence."""
    from rich.text import Text

    from vitkit.catalogue import find
    from vitkit.cli.console import console

    entry, meant = find(name)
    out = console()
    title = meant[0].name if len(meant) == 1 else entry.name
    out.print(Text(title, style="bold"), Text(f"· {_what(entry, meant)}"))
    out.print(Text(entry.summary))
    for method in meant:
        _show_method(out, method, alone=len(meant) == 1)
    if not meant:
        out.print(Text("\nNo code comes with it yet; `vitkit methods` lists what can be used."))
    _show_paper(out, entry)
    _show_evidence(out, entry)


def _what(entry: Entry, meant: list[Method]) -> str:
    kinds = dict.fromkeys(f"{m.kind} ({m.slot})" if m.slot else m.kind for m in meant)
    if kinds:
        return ", ".join(kinds)
    return f"{entry.kind} ({entry.slot})" if entry.slot else entry.kind


def _show_method(out: Any, method: Method, alone: bool) -> None:
    from rich.text import Text

    from vitkit.catalogue.options import options
    from vitkit.cli.console import table
    from vitkit.errors import VitkitError

    if not alone:
        out.print(Text(f"\n{method.name}", style="bold"), Text(f"· {method.kind}"))
    try:
        found = method.load()
    except VitkitError as error:
        # a missing extra must not hide the paper and the evidence
        out.print(Text(f"\nNot usable here: {error}"))
        return
    first = (inspect.getdoc(found) or "").partition("\n\n")[0]
    if first:
        out.print(Text(" ".join(first.split())))
    rows = options(found)
    out.print(Text("\nIn Python", style="bold"))
    for line in _python(method, found, rows):
        out.print(Text(f"  {line}"), soft_wrap=True)
    out.print(Text("\nIn a study", style="bold"))
    for line in _study(method, rows):
        out.print(Text(f"  {line}"), soft_wrap=True)
    out.print(Text("\nOptions", style="bold"))
    if not rows:
        out.print("  none")
        return
    shown = table("option", "type", "default", "meaning", wrap="meaning")
    for option in rows:
        shown.add_row(*(Text(v) for v in (option.name, option.type, option.default, option.meaning)))
    out.print(shown)


def _python(method: Method, found: Any, rows: list[Option]) -> list[str]:
    """Lines to copy; what the user must choose appears with an ellipsis."""
    from vitkit.catalogue.options import required

    module, _, attribute = method.dotted.partition(":")
    if method.kind == "part":
        pairs = ", ".join(f'"{o.name}": …' for o in rows if o.default == "required")
        part = f'("{method.name}", {{{pairs}}})' if pairs else f'"{method.name}"'
        return ["import vitkit", f'model = vitkit.build("vit_pico", num_classes=10, {method.slot}={part})']
    needs = required(found)
    call = f"{attribute}({', '.join('model.parameters()' if n == 'params' else n for n in needs)})"
    lines = {
        "transform": f"smaller, change = {call}",
        "probe": f"result = {call}",
        "objective": f'loss = {call}({{"images": images, "labels": labels}})["loss"]',
        "optimizer": f"optimizer = {call}",
        "strategy": f"strategy = {call}",
        "backbone": f"model = {call}",
    }
    return [f"from {module} import {attribute}", lines.get(method.kind, call)]


def _study(method: Method, rows: list[Option]) -> list[str]:
    lines = [f"vitkit study ./my-images --recipes vit,{method.name}"]
    settable = next((o for o in rows if o.default not in ("required", "None") and o.name != "warm"), None)
    if settable:
        value = settable.default.strip("'\"")
        if not set(value) & set(" ,+:()[]{}/"):
            lines.append(f"vitkit study ./my-images --recipes vit,{method.name}:{settable.name}={value}")
    return lines


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
    from vitkit.evidence.runner import read_evidence

    record = read_evidence(entry)
    if record:
        out.print(Text("\nEvidence", style="bold"))
        print_record(out, record)
    elif entry.provides:
        out.print(Text(f"\nEvidence: none on file; `vitkit evidence {entry.name}` runs the experiment."))
