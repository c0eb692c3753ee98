"""The selective scan's fast methods against its loop over the steps: same inputs, interleaved.

    python benchmarks/selective_scan.py [--length 1024] [--rounds 5] [--threads 1] [--json FILE]

Target: at L=1,024 and S=16 a method on the CPU is at least 20× as fast as "sequential" for B = 2 to 8 and
E = 128 to 384, forward alone and forward with backward.

Measured twice: with freed memory returned to the system, as the C library does by itself ("memory": "returned"), and
with freed memory kept ("kept"). The loop's states are large, so that half of its time and more is the system clearing
pages for it; what is left with "kept" is the arithmetic.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from memory import keep_freed_memory

from vitkit.models import scan_kernel
from vitkit.models.scan import selective_scan

STATES = 16


def inputs(batch: int, length: int, channels: int) -> dict[str, torch.Tensor]:
    """As a fresh Mamba block has them: steps between 0.001 and 0.1, A from −1 to −16."""
    torch.manual_seed(0)
    return {
        "u": torch.randn(batch, length, channels),
        "delta": torch.exp(torch.empty(batch, length, channels).uniform_(-6.9, -2.3)),
        "A": -torch.arange(1.0, STATES + 1).repeat(channels, 1),
        "Bm": torch.randn(batch, length, 1, STATES),
        "Cm": torch.randn(batch, length, 1, STATES),
    }


def seconds(method: str, given: dict[str, torch.Tensor], train: bool) -> float:
    leaves = {name: tensor.clone().requires_grad_(train) for name, tensor in given.items()}
    started = time.perf_counter()
    with torch.set_grad_enabled(train):
        y = selective_scan(**leaves, delta_softplus=False, method=method)  # type: ignore[call-overload]
        if train:
            y.sum().backward()
    return time.perf_counter() - started


def compare(
    memory: str, batch: int, channels: int, length: int, rounds: int, train: bool, methods: list[str]
) -> dict[str, object]:
    given = inputs(batch, length, channels)
    took: dict[str, list[float]] = {m: [] for m in methods}
    for i in range(-1, rounds):
        for method in methods:
            value = seconds(method, given, train)
            if i >= 0:
                took[method].append(value)
    row: dict[str, object] = {
        "memory": memory, "B": batch, "E": channels, "pass": "forward and backward" if train else "forward",
    }  # fmt: skip
    if not train:
        # what any method pays that computes exp(ΔA) of all states with PyTorch's own operator
        exponents = torch.randn(batch, length, channels, STATES)
        started = time.perf_counter()
        for _ in range(rounds):
            exponents.exp()
        row["exp_alone_ms"] = round(1e3 * (time.perf_counter() - started) / rounds, 2)
    for method in methods:
        row[f"{method}_ms"] = round(1e3 * statistics.median(took[method]), 2)
    for method in methods[1:]:
        # rounds share the state of the machine, so the ratio is that of each round
        row[f"{method}_speedup"] = round(statistics.median(s / f for s, f in zip(took["sequential"], took[method])), 1)
    return row


def run(report: Callable[[dict[str, object]], None], length: int, rounds: int) -> None:
    methods = ["sequential", "chunked"] + ([] if scan_kernel.reason() else ["native"])
    for memory in ("returned", "kept"):
        if memory == "kept" and not keep_freed_memory():
            return
        for batch, channels in ((2, 128), (2, 384), (4, 256), (8, 128), (8, 384)):
            for train in (False, True):
                report(compare(memory, batch, channels, length, rounds, train, methods))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as PyTorch chooses")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []

    def report(row: dict[str, object]) -> None:
        print(json.dumps(row), flush=True)
        rows.append(row)

    run(report, args.length, args.rounds)
    result = {
        "length": args.length,
        "states": STATES,
        "rows": rows,
        "auto": "chunked" if scan_kernel.reason() else "native",
        "native_missing_because": scan_kernel.reason(),
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
