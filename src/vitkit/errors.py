"""Errors a user can act on: what was given, what is allowed, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VitkitError(Exception):
    """Base of every error the command line prints as one paragraph instead of a traceback."""


class UnknownName(VitkitError, LookupError):
    """A name that no table knows; the message suggests the nearest known one."""


class BadInput(VitkitError, ValueError):
    """A file, table, array, option or checkpoint that cannot be used as given."""


class MissingExtra(VitkitError, ImportError):
    """An optional dependency is absent; the message is the command that installs it.

    Args:
        needs: what the user asked for, e.g. ``"Parquet tables"``.
        package: the module that could not be imported, e.g. ``"pyarrow"``.
        extra: the extra of vitkit that brings it, e.g. ``"tables"``.
    """

    def __init__(self, needs: str, package: str, extra: str) -> None:
        super().__init__(f'{needs} needs {package}: pip install "vitkit[{extra}]"')


def unknown(kind: str, name: str, known: Iterable[str], command: str) -> UnknownName:
    """Build the error for a name that is not in a table.

    >>> str(unknown("method", "gptak", ["gptaq", "tome"], "vitkit methods"))
    "No method is called 'gptak'. Did you mean 'gptaq'? See all 2 with `vitkit methods`."
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownName(f"No {kind} is called {name!r}.{hint} See all {len(names)} with `{command}`.")
