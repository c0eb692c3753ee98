"""Training step of the host against timm's own class: same weights, same batch, interleaved.

    python benchmarks/host_step.py [--model vit_tiny_patch16_224] [--batch 8] [--rounds 12] [--json FILE]

Target: at most 1.03× timm, float32 and bfloat16; re-hosting adds no memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import timm
import torch
from torch import nn

from vitkit import rehost


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    started = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(images).float(), labels).backward()
    optimizer.step()
    return time.perf_counter() - started


def compare(name: str, batch: int, rounds: int, dtype: torch.dtype) -> dict[str, object]:
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=10).to(dtype).train()
    torch.manual_seed(0)
    ours = rehost(timm.create_model(name, num_classes=10)).to(dtype).train()
    side = theirs.patch_embed.img_size[0]
    images, labels = torch.randn(batch, 3, side, side, dtype=dtype), torch.randint(0, 10, (batch,))
    pairs = [(m, torch.optim.AdamW(m.parameters(), lr=1e-5)) for m in (theirs, ours)]
    ratios, times = [], [[], []]
    for i in range(-2, rounds):
        # swapping who goes first removes what the order itself costs
        order = (0, 1) if i % 2 else (1, 0)
        took = [0.0, 0.0]
        for k in order:
            took[k] = step(pairs[k][0], images, labels, pairs[k][1])
        if i >= 0:
            ratios.append(took[1] / took[0])
            times[0].append(took[0])
            times[1].append(took[1])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "timm_ms": round(1e3 * statistics.median(times[0]), 2),
        "vitkit_ms": round(1e3 * statistics.median(times[1]), 2),
        "ratio": round(statistics.median(ratios), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    original = timm.create_model(args.model)
    hosted = rehost(original)
    own = {p.data_ptr() for p in original.parameters()}
    extra = sum(p.numel() * p.element_size() for p in hosted.parameters() if p.data_ptr() not in own)
    rows = [compare(args.model, args.batch, args.rounds, d) for d in (torch.float32, torch.bfloat16)]
    result = {
        "model": args.model,
        "batch": args.batch,
        "rows": rows,
        "bytes_added_by_rehosting": extra,
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
