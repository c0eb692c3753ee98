"""Paper digests in Markdown: read into rows, and rows written in either form or as JSON, BibTeX and CSV."""

from __future__ import annotations

from vitkit.catalogue.digests.read import read, read_file
from vitkit.catalogue.digests.row import Digest, Note, Row, Unreadable
from vitkit.catalogue.digests.write import FORMS, write

__all__ = ["FORMS", "Digest", "Note", "Row", "Unreadable", "read", "read_file", "write"]
