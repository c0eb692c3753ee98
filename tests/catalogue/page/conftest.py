from __future__ import annotations

from pathlib import Path

import pytest

from vitkit.catalogue.digests import Digest, Row
from vitkit.catalogue.library import Library

#: what would run if a page took text for markup
HOSTILE = '<img src=x onerror="document.title=\'taken\'"><script>document.title="taken"</script> & "quoted"'

ROWS = (
    Row(
        arxiv_id="9901.00001",
        version=2,
        title=HOSTILE,
        date="1999-01-02",
        abstract=f"About zebras. {HOSTILE}",
        comment="</script><b>bold",
        code="javascript:alert(1) https://example.org/zebras words",
        section='Zebras "><i>',
        form="table",
    ),
    Row(arxiv_id="9901.00001", version=1, title="Before", date="1999-01-01", section='Zebras "><i>', form="table"),
    Row(
        arxiv_id="hep-th/9901001",
        title="Of zebras and strings",
        date="1999-01-01",
        summary="Strings. " * 60,
        authors=("A. Zebra", "<b>B"),
        section="Papers for 1999-01-01",
        form="daily",
    ),
    Row(arxiv_id="2504.02692", version=3, title="GPTAQ", date="2025-05-13", section="Quantization", form="table"),
)


@pytest.fixture
def path(tmp_path) -> Path:
    """A small library, hostile in every field."""
    file = tmp_path / "papers.db"
    with Library(file) as library:
        library.merge(Digest(rows=ROWS, source="digest.md"))
    return file


@pytest.fixture
def hostile() -> str:
    return HOSTILE
