"""Evidence: a small experiment for each method that shows, or does not show, what its paper claims.

The experiment of the entry ``[gptaq]`` is the module ``vitkit.evidence.gptaq`` with
``run(seeds, progress) -> Evidence``; ``vitkit evidence gptaq`` runs it and keeps what it found.
"""

from __future__ import annotations

from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.evidence.runner import read_evidence, run_evidence

__all__ = ["Evidence", "paired", "read_evidence", "run_evidence", "summarise"]
