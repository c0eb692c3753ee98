"""``precision="auto"`` against timm's float32 eager step: images per second, interleaved, and the loss curves.

    python benchmarks/precision_auto.py [--batch 32] [--rounds 5] [--json FILE]

Target: at least 1.8× for ViT-Tiny at 224, batch 32, with the loss curve within seed noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import timm
import torch
from torch import nn

from vitkit import rehost
from vitkit.train import autocast, choose_attention, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    theirs = timm.create_model(args.model, num_classes=10).train()
    ours = rehost(timm.create_model(args.model, num_classes=10)).train()
    ours.load_state_dict(theirs.state_dict())
    side = theirs.patch_embed.img_size[0]
    images, labels = torch.randn(args.batch, 3, side, side), torch.randint(0, 10, (args.batch,))
    mode = resolve("auto", "cpu")
    choice = choose_attention(ours, images[:8], precision=mode)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4) for m in (theirs, ours)]

    def step(k: int) -> tuple[float, float]:
        model = (theirs, ours)[k]
        started = time.perf_counter()
        optimizers[k].zero_grad(set_to_none=True)
        with autocast(mode if k else "fp32", "cpu"):
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizers[k].step()
        return time.perf_counter() - started, float(loss.detach())

    times, losses = ([], []), ([], [])
    for i in range(-1, args.rounds):
        for k in (0, 1):
            seconds, loss = step(k)
            losses[k].append(loss)
            if i >= 0:
                times[k].append(seconds)
    ratio = statistics.median(a / b for a, b in zip(*times))
    result = {
        "model": args.model,
        "batch": args.batch,
        "mode": mode,
        "attention": choice.path,
        "fused_over_explicit": round(choice.ratio, 3),
        "timm_fp32_images_per_s": round(args.batch / statistics.median(times[0]), 2),
        "vitkit_auto_images_per_s": round(args.batch / statistics.median(times[1]), 2),
        "ratio": round(ratio, 3),
        "largest_loss_difference": round(max(abs(a - b) for a, b in zip(*losses)), 4),
        "losses": {"timm_fp32": losses[0], "vitkit_auto": losses[1]},
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
