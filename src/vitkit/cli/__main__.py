"""``python -m vitkit.cli``."""

from __future__ import annotations

from vitkit.cli.shell import main

main()
