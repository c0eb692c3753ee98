"""The survey's mechanisms one at a time in one tiny ViT: accuracy, weights, operations, time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vitkit.compress.cost import count_flops, count_params, measure_latency
from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.models.parts.readouts.early_exit import exit_early
from vitkit.testing.worlds import fashion_mnist, predict_logits, train_tiny

ARMS: dict[str, dict[str, Any]] = {
    "host: table, softmax attention": {},
    "no positions": {"pos_embed": "none"},
    "rope2d, axial": {"position": ("rope2d", {"kind": "axial"})},
    "rope2d, mixed": {"position": "rope2d"},
    "cpe": {"position": "cpe"},
    "sape2": {"position": "sape2"},
    "partitioned-attention": {"mixer": "partitioned-attention"},
    "pooled-attention, sr=2": {"mixer": "pooled-attention"},
    "additive-attention": {"mixer": "additive-attention"},
    "global-filter": {"mixer": "global-filter"},
    "ninformer": {"mixer": "ninformer"},
    "attention-reuse, every 2": {"block": "attention-reuse"},
    "early-exit, threshold 0.9": {"readout": "early-exit"},
}
# points that a lighter network may lose and still count as equal
MARGIN = 0.01


def run(
    seeds: tuple[int, ...] = (0, 1, 2),
    progress: Callable[[str, int, int], None] | None = None,
    num_train: int = 2_000,
    num_test: int = 2_000,
    epochs: int = 5,
) -> Evidence:
    """Every arm with the same images, batches and epochs; the paper's claim is a survey's and has no number."""
    right: dict[str, list[np.ndarray]] = {name: [] for name in ARMS}
    models: dict[str, Any] = {}
    flops: dict[str, float] = {}
    for i, seed in enumerate(seeds):
        world = fashion_mnist(num_train, num_test, seed=seed)
        for j, (name, options) in enumerate(ARMS.items()):
            models[name] = train_tiny(world, epochs=epochs, seed=seed, **options)
            right[name].append((predict_logits(models[name], world.x_test).argmax(-1) == world.y_test).double().numpy())
            if progress:
                progress("train", i * len(ARMS) + j + 1, len(seeds) * len(ARMS))
    sample = world.x_test[:64]
    for name, model in models.items():
        flops[name] = count_flops(model, sample[:1]) / 2
    early = models["early-exit, threshold 0.9"]
    with torch.no_grad():
        blocks = torch.cat([exit_early(early, part)[1] for part in world.x_test.split(256)]).double().mean()
    depth = len(early.blocks)
    one_block = _macs_of_blocks(early, sample[:1]) / depth
    flops["early-exit, threshold 0.9"] -= one_block * (depth - float(blocks))
    calls: dict[str, Any] = {n: (lambda x: exit_early(early, x)) if m is early else m for n, m in models.items()}
    times = measure_latency(calls, sample, repeats=20, warmup=3)
    return _table(right, models, flops, times, float(blocks), len(seeds), num_train, num_test, epochs)


def _macs_of_blocks(vit: Any, images: torch.Tensor) -> float:
    class Blocks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return vit.embed(x)[0]

    # all but the embedding and the heads, which are a hundredth of a block
    return (count_flops(vit, images) - count_flops(Blocks(), images)) / 2


def _table(
    right: dict[str, list[np.ndarray]],
    models: dict[str, Any],
    macs: dict[str, float],
    times: dict[str, tuple[float, float, float]],
    blocks: float,
    num_seeds: int,
    num_train: int,
    num_test: int,
    epochs: int,
) -> Evidence:
    host = next(iter(ARMS))
    lighter = [name for name in ARMS if macs[name] < 0.98 * macs[host]]
    # one of several may look equal by chance
    confidence = 1 - 0.05 / max(1, len(lighter))
    rows, equal, worse = [], [], []
    for name in ARMS:
        mean, low, high = paired(np.mean(right[name], 0), np.mean(right[host], 0))
        if name in lighter:
            _, strict_low, strict_high = paired(np.mean(right[name], 0), np.mean(right[host], 0), confidence=confidence)
            if strict_low > -MARGIN:
                equal.append(name)
            elif strict_high < -MARGIN:
                worse.append(name)
        rows.append(
            {
                "arm": name,
                "accuracy": summarise([float(r.mean()) for r in right[name]]),
                "against the host": "–" if name == host else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]",
                "parameters": f"{count_params(models[name]):,}",
                "MACs, M": f"{macs[name] / 1e6:.2f}",
                "time, batch 64": f"{times[name][2]:.2f}×",
            }
        )
    return Evidence(
        claim="Lighter mechanisms keep the accuracy of a vision transformer with fewer operations.",
        shown=True if equal else False if len(worse) == len(lighter) else None,
        rows=rows,
        notes=(
            "The survey gives no number. Shown if a network with fewer multiply-adds loses less than "
            f"{100 * MARGIN:.0f} point, with the interval widened for {len(lighter)} lighter arms: "
            f"{', '.join(equal) or 'none'}. Below the margin for sure: {', '.join(worse) or 'none'}. Intervals: 95 % "
            "bootstrap over test images, each image's correctness averaged over seeds. Fourier transforms do not count "
            f"as operations. early-exit went through {blocks:.2f} blocks on average, and its time is that of "
            "exit_early; times are of untuned eager code on one thread."
        ),
        settings={
            "data": f"Fashion-MNIST, {num_train} training and {num_test} test images",
            "host": "width 64, 4 blocks, 4 heads, patch 4, class token",
            "training": f"{epochs} epochs of AdamW, batch 128, from scratch, one setting for all arms",
        },
    )
