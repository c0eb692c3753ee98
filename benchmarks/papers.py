"""How long a large digest takes to import, and a search in the library it makes.

    python benchmarks/papers.py [--rows 10000] [--json FILE]

Synthetic rows with abstracts of 150 words, whose words are as unevenly common as in real texts. Targets for 10,000
rows: at most 10 s for reading the file and merging it, at most 100 ms for a search (median of 50 queries).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

import vitkit
from vitkit.catalogue.digests import Row, read_file, write
from vitkit.catalogue.library import Library


def make_rows(count: int, seed: int = 0) -> tuple[list[Row], list[str]]:
    """``count`` rows, and their words from the commonest to the rarest."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeioulnrst", k=draw.randint(3, 10))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def text(length: int) -> str:
        return " ".join(draw.choices(words, weights, k=length))

    rows = [
        Row(
            arxiv_id=f"{25 + i // 100_000}{1 + i % 12:02}.{i % 100_000:05}",
            version=draw.randint(1, 4),
            title=text(10),
            date=f"2025-{1 + i % 12:02}-{1 + i % 28:02}",
            abstract=text(150),
            comment=text(draw.randint(0, 8)),
            code="https://example.org/code" if i % 4 == 0 else "",
            section="Synthetic",
            form="table",
        )
        for i in range(count)
    ]
    return rows, words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, words = make_rows(arguments.rows)
    # common and rare words together, as people write them
    draw = random.Random(1)
    queries = [
        " ".join(draw.sample(words[:200], 2) + draw.sample(words[200:2000], 1)) for _ in range(arguments.queries)
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digest.md"
        file.write_text(write(rows, "table"), encoding="utf-8")
        started = time.perf_counter()
        digest = read_file(file)
        read_s = time.perf_counter() - started
        with Library(Path(folder) / "papers.db") as library:
            started = time.perf_counter()
            merged = library.merge(digest)
            merge_s = time.perf_counter() - started
            started = time.perf_counter()
            library.merge(digest)
            again_s = time.perf_counter() - started
            times = []
            for query in queries:
                started = time.perf_counter()
                library.search(query)
                times.append(1e3 * (time.perf_counter() - started))
            started = time.perf_counter()
            write(library.rows(), "table")
            export_s = time.perf_counter() - started
        size_mb = file.stat().st_size / 2**20
    lost = arguments.rows - len(merged.new)
    result = {
        "rows": arguments.rows,
        "rows_lost": lost,
        "file_mib": round(size_mb, 1),
        "read_s": round(read_s, 2),
        "merge_s": round(merge_s, 2),
        "import_s": round(read_s + merge_s, 2),
        "merge_again_s": round(again_s, 2),
        "export_s": round(export_s, 2),
        "search_ms": round(statistics.median(times), 2),
        "search_ms_slowest": round(max(times), 2),
        "queries": len(queries),
        "allowed": {"import_s": 10, "search_ms": 100},
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
        "versions": {
            "vitkit": vitkit.__version__,
            "sqlite": sqlite3.sqlite_version,
            "python": platform.python_version(),
        },
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
