"""The command line: one small file a verb, imported when the verb is used."""

from __future__ import annotations

from vitkit.cli.shell import app, main

__all__ = ["app", "main"]
