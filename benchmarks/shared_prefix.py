"""Six recipes that differ only in transforms against one of them: wall time of the study.

    python benchmarks/shared_prefix.py [--epochs 20] [--json FILE]

Target: at most 1.3×, since the training is shared.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from vitkit.study.run import run_study
from vitkit.study.settings import make_settings

SIX = ["vit", "tome:r=2", "dymu:target_tokens=8", "rtn-w4", "gptq-w4", "gptaq-w4"]


def seconds(recipes: list[str], epochs: int) -> float:
    settings = make_settings(
        {
            "data": "digits",
            "protocol": {"epochs": epochs},
            "recipes": recipes,
            "measures": {"attacks": [], "explainers": [], "latency": False, "gallery_images": 0},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        run_study(settings, folder)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seconds(["vit"], 1)  # imports and caches
    one, six = seconds(["gptq-w4"], args.epochs), seconds(SIX, args.epochs)
    result = {
        "recipes": SIX,
        "epochs": args.epochs,
        "one_s": round(one, 2),
        "six_s": round(six, 2),
        "ratio": round(six / one, 3),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
