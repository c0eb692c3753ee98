"""Wall time of the command line's quick verbs, best and median of several starts.

    python benchmarks/cli_startup.py [--repeats 7] [--json FILE]

Target: at most 0.5 s each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {}
    for verb in (["--help"], ["methods"], ["papers", "--family", "parts"]):
        times = []
        for _ in range(args.repeats):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "vitkit.cli", *verb], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - started)
        rows["vitkit " + " ".join(verb)] = {
            "best_s": round(min(times), 3),
            "median_s": round(statistics.median(times), 3),
        }
    print(json.dumps(rows, indent=1))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
