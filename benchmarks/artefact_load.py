"""From a folder to the first prediction, in a fresh process that cannot import torch.

    python benchmarks/artefact_load.py [--model vit_small_patch16_224] [--precisions f32,int8+bf16] [--rounds 7]
                                       [--json FILE]

Each process imports vitkit.deploy, checks the hashes of the artefact, loads the engine and answers for one image file.
Target: at most 1 s for ViT-S. `process_s` also counts the start of Python.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FIRST = """
import sys, time
begun = time.perf_counter()
sys.modules["torch"] = None
from vitkit.deploy import load
imported = time.perf_counter()
artefact = load(sys.argv[1])
loaded = time.perf_counter()
artefact.predict([sys.argv[2]])
print(imported - begun, loaded - imported, time.perf_counter() - loaded)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--precisions", default="f32,int8+bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        image = Path(scratch) / "one.jpg"
        pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image)
        rows = [
            {
                "model": options.model,
                "precision": p,
                **measure(make(options.model, p, Path(scratch)), image, options.rounds),
            }
            for p in options.precisions.split(",")
        ]
    for row in rows:
        print(row)
    if options.json:
        result = {
            "rows": rows,
            "python": platform.python_version(),
            "machine": platform.processor() or platform.machine(),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def make(name: str, precision: str, scratch: Path) -> Path:
    """The artefact of a network with fresh weights, in OpenVINO."""
    import torch

    import vitkit
    from vitkit.deploy import deploy

    torch.manual_seed(0)
    images = np.random.default_rng(0).random((24, 3, 224, 224), dtype=np.float32)
    found = deploy(
        vitkit.build(name).eval(), images, out=scratch / precision, engines=["openvino"], precisions=[precision],
        max_drop=100, batches=(1,),
    )  # fmt: skip
    return found.folder


def measure(folder: Path, image: Path, rounds: int) -> dict[str, Any]:
    """Medians of ``rounds`` processes, after one that warms the disk."""
    found, walls = [], []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", FIRST, str(folder), str(image)], capture_output=True, text=True, check=True
        )
        walls.append(time.perf_counter() - begun)
        found.append([float(v) for v in done.stdout.split()])
    imports, loads, firsts = (statistics.median(column) for column in zip(*found[1:]))
    return {
        "import_s": round(imports, 3),
        "load_s": round(loads, 3),
        "first_prediction_s": round(firsts, 3),
        "total_s": round(statistics.median(sum(row) for row in found[1:]), 3),
        "process_s": round(statistics.median(walls[1:]), 3),
    }


if __name__ == "__main__":
    main()
