"""Rich's console and tables as the verbs use them."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

#: columns where the output is a file or a pipe, which has no width of its own
PIPE_WIDTH = 140
#: from this width on a table shows all its columns
WIDE = 110


def console() -> Console:
    """A console on stdout that does not squeeze tables into 80 columns when piped."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(width=width, highlight=False)


def table(*columns: str, wrap: str = "", right: tuple[str, ...] = ()) -> Table:
    """A plain table; all columns stay whole except ``wrap``, which takes what is left."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(
            column,
            no_wrap=column != wrap,
            overflow="fold",
            ratio=1 if column == wrap else None,
            justify="right" if column in right else "left",
        )
    return made


def print_json(value: Any) -> None:
    """Machine-readable output, on stdout, in UTF-8 letters."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
