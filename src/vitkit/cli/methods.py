"""``vitkit methods``: what a study can use."""

from __future__ import annotations

from typing import Annotated

import typer


def methods(
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            "-k",
            help="Only this kind: part, objective, transform, probe, strategy, recipe, optimizer or backbone.",
        ),
    ] = None,
    taxonomy: Annotated[
        str | None,
        typer.Option(
            "--taxonomy",
            "-t",
            help="The cells of a survey (lightweight-vit-survey or vision-mamba-remote-sensing, or its arXiv id), and "
            "the recipes that stand for them.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the methods that can be used, by kind or by the cells of a survey."""
    if taxonomy is not None:
        _show_taxonomy(taxonomy, as_json)
        return
    from vitkit.catalogue import KINDS
    from vitkit.catalogue import methods as all_methods
    from vitkit.errors import unknown

    if kind is not None and kind not in KINDS:
        raise unknown("kind", kind, KINDS, "vitkit methods")
    chosen = [m for m in all_methods().values() if kind in (None, m.kind)]
    chosen.sort(key=lambda m: (KINDS.index(m.kind), m.slot, m.name))
    if as_json:
        from vitkit.cli.console import print_json

        print_json(
            [
                {
                    "name": m.name,
                    "kind": m.kind,
                    "slot": m.slot,
                    "provides": m.dotted,
                    "entry": m.entry.name,
                    "id": m.entry.id,
                    "title": m.entry.title,
                    "summary": m.entry.summary,
                    "source": m.entry.source,
                }
                for m in chosen
            ]
        )
        return
    from rich.text import Text

    from vitkit.cli.console import WIDE, console, table

    out = console()
    if not chosen:
        out.print("No method matches.")
        return
    wide = out.width >= WIDE
    about = "what its paper is about"
    rows = table("method", "kind", *(["slot", "arXiv"] if wide else []), about, wrap=about)
    for method in chosen:
        place = [method.slot, method.entry.id] if wide else []
        rows.add_row(Text(method.name, style="bold"), method.kind, *place, Text(method.entry.summary))
    out.print(rows)
    out.print(f"\n{len(chosen)} methods. `vitkit show NAME` tells how to use one.")


def _show_taxonomy(survey: str, as_json: bool) -> None:
    from vitkit.catalogue.taxonomy import taxonomy

    entry, cells = taxonomy(survey)
    if as_json:
        from dataclasses import asdict

        from vitkit.cli.console import print_json

        print_json({"survey": entry.name, "id": entry.id, "title": entry.title, "cells": [asdict(c) for c in cells]})
        return
    from rich.text import Text

    from vitkit.cli.console import console, table

    out = console()
    out.print(f"{entry.title} (arXiv:{entry.id})\n")
    rows = table("group", "mechanism", "recipes, Python", wrap="recipes, Python")
    shown = ""
    for cell in cells:
        python = [dotted.replace(":", ".") for dotted in cell.python]
        what = "\n".join([*cell.recipes, *python, *([cell.note] if cell.note else [])])
        rows.add_row(Text("" if cell.group == shown else cell.group, style="bold"), cell.name, Text(what))
        shown = cell.group
    out.print(rows)
    some = [cell.recipes[0] for cell in cells if cell.recipes and cell.recipes[0] != "vit"][:3]
    out.print(f"\nCompare some of them: vitkit study digits --recipes {','.join(['vit', *some])}")
