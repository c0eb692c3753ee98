"""Summaries of papers (objective, method, result, implication), and a check that their figures are in the abstract."""

from __future__ import annotations

from vitkit.catalogue.summaries import extractive, figures
from vitkit.catalogue.summaries.endpoint import Endpoint
from vitkit.catalogue.summaries.summarise import NoSummary, Writer, summarise

__all__ = ["Endpoint", "NoSummary", "Writer", "extractive", "figures", "summarise"]
