"""Does the loader keep up? A folder of JPEGs, ViT-Tiny at 224, and how long the model waits for its batches.

Prints one JSON object. ``waiting_ratio`` is the share of a step's time in which the model had no batch to work on, once
with float32 steps and once with the faster ones of ``precision="auto"``; the promise is at most 0.15 on two cores with
2,000 JPEGs of 500×375.

    python benchmarks/data_loading.py                    # as promised
    python benchmarks/data_loading.py --images 200 --steps 5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import vitkit
from vitkit import rehost
from vitkit.data import make_loader, open_source
from vitkit.train import autocast, choose_attention


def make_folder(root: Path, count: int, size: tuple[int, int] = (500, 375), seed: int = 0) -> None:
    """``count`` JPEGs in ten classes with the detail, and so the decoding cost, of photographs (about 50 kB each)."""
    rng = np.random.default_rng(seed)
    width, height = size
    for i in range(count):
        folder = root / f"class{i % 10}"
        folder.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.int16)
        fine = rng.normal(0, 9, (height, width, 1)).astype(np.int16)
        picture = np.clip(smooth + fine, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i:05d}.jpg", quality=85)


def loading_alone(source: Any, batch_size: int, workers: int | str, augment: str) -> float:
    """Images per second of the loader with nobody else at work."""
    loader = make_loader(
        source,
        np.arange(len(source)),
        (224, 224),
        3,
        batch_size,
        train=True,
        augment=augment,
        workers=workers,
        cache_mb=0,
    )
    batches = iter(loader)
    next(batches)
    started, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch["images"])
    return count / (time.perf_counter() - started)


def training(
    source: Any, batch_size: int, steps: int, workers: int | str, augment: str, precision: str, warm_up: int = 2
) -> dict[str, Any]:
    """Train and measure, step by step, the time spent waiting for the batch and the whole."""
    torch.manual_seed(0)
    model = rehost(timm.create_model("vit_tiny_patch16_224", num_classes=source.num_outputs))
    if precision == "auto":
        choose_attention(model, torch.randn(8, 3, 224, 224))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = make_loader(
        source,
        np.arange(len(source)),
        (224, 224),
        3,
        batch_size,
        train=True,
        augment=augment,
        workers=workers,
        cache_mb=0,
    )
    waits: list[float] = []
    wholes: list[float] = []
    epoch = 0
    while len(wholes) < warm_up + steps:
        loader.set_epoch(epoch)
        batches = iter(loader)
        while len(wholes) < warm_up + steps:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            got = time.perf_counter()
            optimizer.zero_grad()
            with autocast(precision, "cpu"):
                logits = model(batch["images"])
            F.cross_entropy(logits.float(), batch["labels"]).backward()
            optimizer.step()
            waits.append(got - started)
            wholes.append(time.perf_counter() - started)
        epoch += 1
    waits, wholes = waits[warm_up:], wholes[warm_up:]
    return {
        "waiting_ratio": sum(waits) / sum(wholes),
        "wait_ms": 1e3 * statistics.median(waits),
        "step_ms": 1e3 * statistics.median(wholes),
        "step_ms_spread": [1e3 * float(q) for q in np.quantile(wholes, (0.25, 0.75))],
        "images_per_second": batch_size * len(wholes) / sum(wholes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--augment", default="light", choices=["none", "light", "strong"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    workers = arguments.workers if arguments.workers == "auto" else int(arguments.workers)
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), arguments.images)
        started = time.perf_counter()
        source = open_source(folder)
        opened = time.perf_counter() - started
        result = {
            precision: training(source, arguments.batch_size, arguments.steps, workers, arguments.augment, precision)
            for precision in ("fp32", "auto")
        }
        alone = loading_alone(source, arguments.batch_size, workers, arguments.augment)
    text = json.dumps(
        {
            **result,
            "allowed_waiting_ratio": 0.15,
            "loader_alone_images_per_second": alone,
            "check_all_images_seconds": opened,
            "settings": {k: v for k, v in vars(arguments).items() if k != "json"}
            | {"image": "500x375 JPEG, quality 85", "model": "ViT-Ti/16 at 224"},
            "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.platform()},
            "versions": {"vitkit": vitkit.__version__, "torch": torch.__version__, "timm": timm.__version__},
        },
        indent=1,
    )
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
