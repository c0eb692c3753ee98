"""Every part, and the small network of every file, as an ONNX graph: does it export, and does it answer the same?

    python benchmarks/onnx_parts.py [--names sinkhorn vmamba] [--json FILE]

Largest difference of the logits between ONNX Runtime and PyTorch on the CPU, over the images of the export and others;
``logits`` is the largest logit. Parts sit in a ViT of width 32. What does not export has the exporter's first reason
and, as ``note``, its own. Target: a difference below a thousandth of the largest logit, or a note.
"""

from __future__ import annotations

import argparse
import json
import logging
from importlib.metadata import version
from pathlib import Path

import torch

from vitkit.catalogue import methods
from vitkit.testing import NotConforming
from vitkit.testing.onnx import onnx_case, onnx_gap, onnx_names


def measure(name: str) -> dict[str, object]:
    model, images, note = onnx_case(name)
    other = torch.rand(images.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = float(model(images).abs().max())
    row: dict[str, object] = {"name": name, "kind": methods()[name].slot or "network", "exports": True}
    try:
        row["max_difference"] = float(f"{onnx_gap(model, images, other):.2g}")
    except NotConforming as error:
        row |= {"exports": False, "max_difference": None, "reason": str(error)}
    return row | {"logits": round(logits, 3)} | ({"note": note} if note else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", nargs="+", default=onnx_names())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # the optimizer of graphs warns of everything that it leaves as it is
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    rows = []
    for name in args.names:
        rows.append(measure(name))
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    result = {
        "rows": rows,
        "exported": sum(bool(row["exports"]) for row in rows),
        "of": len(rows),
        "versions": {package: version(package) for package in ("torch", "onnx", "onnxscript", "onnxruntime")},
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
