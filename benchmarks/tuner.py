"""The tuner's choice against measuring everything: how far it is from the best, and what it costs.

    python benchmarks/tuner.py [--model vit_small_patch16_224] [--budget 3m] [--rounds 20] [--json FILE]

First ``vitkit.deploy.deploy`` chooses within its budget, from engines × number formats × batch sizes. Then all that
it could have chosen, without a budget and without a probe to prune them: every engine and format in every setting it
offers for every batch size, made and loaded, taking turns. ``behind`` is how much slower the choice is than the fastest
of those as faithful. Engines that compile for minutes are left out of both unless --engines names them.

Targets: at most 3 % behind; the tuner itself at most 3 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from vitkit.deploy.engines import Runner, Setting, engine
from vitkit.deploy.faithful import compare
from vitkit.deploy.machine import cores, machine, versions
from vitkit.deploy.measure import take_turns
from vitkit.deploy.source import Source
from vitkit.deploy.tuner import deploy
from vitkit.models.rehost import rehost
from vitkit.study.settings import parse_duration

ENGINES = "openvino,onnxruntime,torch-eager"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--budget", default="3m")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--engines", default=ENGINES)
    parser.add_argument("--images", type=int, default=96, help="half of them to calibrate, half to compare")
    parser.add_argument("--max-drop", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(cores())
    model = rehost(timm.create_model(args.model, num_classes=10).eval())
    nn.init.normal_(model.head.weight, std=0.5)
    side = model.patch_embed.img_size[0]
    images = np.random.default_rng(0).random((args.images, 3, side, side), dtype=np.float32)
    chosen_for, held = images[: args.images // 2], images[args.images // 2 :]
    batches = tuple(int(b) for b in args.batches.split(","))
    names = args.engines.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["VITKIT_CACHE"] = f"{scratch}/cache"
        begun = time.perf_counter()
        found = deploy(
            model, held, calibration=chosen_for, out=f"{scratch}/out", max_drop=args.max_drop, engines=names,
            budget=parse_duration(args.budget), batches=batches,
        )  # fmt: skip
        seconds = time.perf_counter() - begun
        print(f"{found.chosen.name} {found.chosen.setting} after {seconds:.0f} s", flush=True)
        everything, dropped = exhaustive(model, chosen_for, held, Path(scratch), names, batches, args.max_drop)
        probe = held[np.arange(max(batches)) % len(held)]
        calls = {label: (runner, probe[: setting.batch]) for label, (runner, setting) in everything.items()}
        timings = take_turns(calls, rounds=args.rounds, seconds=1800)
    speed = {label: everything[label][1].batch / t.ms * 1000 for label, t in timings.items()}
    assert found.chosen.setting is not None
    choice = label_of(found.chosen.engine, found.chosen.precision, found.chosen.setting)
    best = max(speed, key=lambda label: speed[label])
    result = {
        "model": args.model, "tuner_seconds": round(seconds, 1), "chosen": choice, "fastest": best,
        "behind": round(1 - speed[choice] / speed[best], 4), "images_per_s": {k: round(v, 2) for k, v in speed.items()},
        "noise": {k: round(t.noise, 3) for k, t in timings.items()}, "lost_too_much": dropped,
        "untried_by_the_tuner": [r.name for r in found.rows if r.status in ("not tried", "slower")],
        "machine": machine(), "versions": versions(),
    }  # fmt: skip
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def label_of(name: str, precision: str, setting: Setting) -> str:
    return f"{name} {precision}, batch {setting.batch}, threads {setting.threads}, streams {setting.streams}"


def exhaustive(
    model: nn.Module,
    chosen_for: np.ndarray,
    held: np.ndarray,
    scratch: Path,
    names: list[str],
    batches: tuple[int, ...],
    max_drop: float,
) -> tuple[dict[str, tuple[Runner, Setting]], list[str]]:
    """Every faithful engine in every setting; the names of those that lose too much."""
    source = Source(model, chosen_for, scratch)
    reference = source.logits(held)
    kept: dict[str, tuple[Runner, Setting]] = {}
    dropped = []
    for name in names:
        module = engine(name)
        for precision in () if module.unavailable() else module.precisions():
            folder = scratch / f"{name}-{precision}"
            folder.mkdir()
            module.make(source, precision, folder)
            settings = [s for batch in batches for s in module.settings(batch, cores())]
            outputs = module.load(folder, precision, settings[0]).run(held)
            if compare(reference, outputs, None, "classify").drop > max_drop:
                dropped.append(f"{name} {precision}")
                continue
            for setting in settings:
                kept[label_of(name, precision, setting)] = (module.load(folder, precision, setting), setting)
    return kept, dropped


if __name__ == "__main__":
    main()
