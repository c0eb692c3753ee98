"""Every engine of this machine on one ViT, beside timm, Hugging Face and vit-pytorch: images a second, taking turns.

    python benchmarks/engines.py [--model vit_small_patch16_224] [--batch 8] [--merge 0.35] [--seconds 120]
        [--engines openvino,onnxruntime] [--json FILE]

Weights are random; times do not depend on them. "cut" rows have as many tokens in every block as the merging ones, but
by leaving the last ones out: what a merging row takes longer is the price of matching and merging. Ratios are to timm's
model in eager float32 on all cores. ``limit`` is the share of the fastest matrix product, by PyTorch, that this machine
was seen to do in the same run (float32 and bfloat16 only).

Targets, ViT-S and ViT-B: float32 2.3×, bfloat16 4.5× (ViT-B), int8 with the rest in bfloat16 7×, merged on top 10×.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from vitkit.compress.cost import count_flops
from vitkit.compress.merge.tome import tome
from vitkit.deploy.engines import ENGINES, Runner, Setting, engine
from vitkit.deploy.machine import cores, machine, versions
from vitkit.deploy.measure import take_turns
from vitkit.deploy.source import Source
from vitkit.models.layout import TokenLayout
from vitkit.models.rehost import rehost


class Call:
    """A peer as a runner."""

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.call = call

    def run(self, images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.call(torch.from_numpy(images)).float().numpy()

    def describe(self) -> dict[str, Any]:
        return {}


def peers(name: str, model: nn.Module, side: int) -> dict[str, Runner | str]:
    """Other people's ViTs of the same shape; a string says why one is missing."""
    found: dict[str, Runner | str] = {"timm eager": Call(model), "timm compiled": Call(torch.compile(model))}
    width, depth, heads = model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads
    patch = model.patch_embed.patch_size[0]
    try:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
            image_size=side, patch_size=patch, num_labels=1000,
        )  # fmt: skip
        theirs = ViTForImageClassification(config).eval()
        found["Hugging Face eager"] = Call(lambda x: theirs(x).logits)
    except ImportError:
        found["Hugging Face eager"] = "pip install transformers"
    try:
        from vit_pytorch import ViT as Lucid

        plain = Lucid(
            image_size=side, patch_size=patch, num_classes=1000, dim=width, depth=depth, heads=heads,
            dim_head=width // heads, mlp_dim=4 * width,
        ).eval()  # fmt: skip
        found["vit-pytorch eager"] = Call(plain)
    except ImportError:
        found["vit-pytorch eager"] = "pip install vit-pytorch"
    return found


class Cut(nn.Module):
    """Keeps as many rows as a token merger, without looking at them."""

    def __init__(self, num_merges: int) -> None:
        super().__init__()
        self.num_merges = num_merges

    def forward(self, x: torch.Tensor, keys: torch.Tensor, layout: TokenLayout) -> tuple[torch.Tensor, TokenLayout]:
        return x[:, : x.shape[1] - self.num_merges], layout


def cut(merging: nn.Module) -> nn.Module:
    """A copy of a merging model that cuts in place of merging."""
    new = deepcopy(merging)
    for block in new.blocks:
        block.reduce = Cut(block.reduce.num_merges)
    return new


def plain_openvino(model: nn.Module, images: np.ndarray) -> Runner:
    """OpenVINO as its first page shows it: convert, compile, call."""
    import openvino as ov

    compiled = ov.compile_model(ov.convert_model(model, example_input=torch.from_numpy(images)), "CPU")

    class Plain:
        def run(self, images: np.ndarray) -> np.ndarray:
            return compiled(images)[0]

        def describe(self) -> dict[str, Any]:
            return {}

    return Plain()


def best_product(dtype: torch.dtype, seconds: float = 1.5) -> float:
    """Operations a second of the fastest of three matrix products."""
    best = 0.0
    for rows, inner, columns in ((1576, 768, 3072), (2048, 2048, 2048), (4096, 1024, 1024)):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        nn.functional.linear(a, b)
        until = time.perf_counter() + seconds / 3
        while time.perf_counter() < until:
            started = time.perf_counter()
            nn.functional.linear(a, b)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--merge", default="", help="shares of tokens to merge, on top of OpenVINO's int8+bf16")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--seconds", type=float, default=120, help="of measuring")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(cores())
    model = timm.create_model(args.model).eval()
    nn.init.normal_(model.head.weight, std=0.02)
    side = model.patch_embed.img_size[0]
    flops = count_flops(model, torch.zeros(1, 3, side, side))
    rng = np.random.default_rng(0)
    images = rng.random((args.batch, 3, side, side), dtype=np.float32)
    ours = rehost(model)
    calls: dict[str, tuple[Runner, str, str, np.ndarray | None]] = {}
    missing: dict[str, str] = {}
    reference = Call(model).run(images)
    for name, peer in peers(args.model, model, side).items():
        if isinstance(peer, str):
            missing[name] = peer
        elif name == "timm eager" or not args.skip_peers:
            same = reference if name.startswith("timm") else None
            calls[name] = (peer, name, "f32", same)
    with tempfile.TemporaryDirectory() as scratch:
        sources = {"": Source(ours, rng.random((32, 3, side, side), dtype=np.float32), Path(scratch))}
        for share in [s for s in args.merge.split(",") if s]:
            merged, _ = tome(ours, ratio=float(share))
            for kind, network in (("merge", merged), ("cut", cut(merged))):
                folder = Path(scratch) / f"{kind}-{share}"
                folder.mkdir()
                sources[f" {kind} {share}"] = Source(network, sources[""].calibration, folder)
        if "openvino" in args.engines and not args.skip_peers:
            calls["OpenVINO used plainly"] = (
                plain_openvino(model, images),
                "OpenVINO used plainly",
                "default",
                reference,
            )
        for name in args.engines.split(","):
            module = engine(name)
            if module.unavailable():
                missing[name] = module.unavailable()
                continue
            for suffix, source in sources.items():
                for precision in module.precisions():
                    if suffix and (name != "openvino" or precision != module.precisions()[-1]):
                        continue
                    label = f"{name} {precision}{suffix}"
                    try:
                        runner, setting = fastest(
                            module, source, precision, Path(scratch) / label.replace(" ", "_"), images
                        )
                    except Exception as error:
                        missing[label] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                        continue
                    calls[label] = (runner, name + suffix, precision, source.logits(images))
                    print(f"{label}: {setting}", flush=True)
        limits = {"f32": best_product(torch.float32), "bf16": best_product(torch.bfloat16)}
        timings = take_turns({k: (c[0], images) for k, c in calls.items()}, rounds=40, seconds=args.seconds)
        rows = []
        for label, (runner, who, precision, expected) in calls.items():
            t = timings[label]
            speed = args.batch / t.ms * 1000
            reduced = " merge" in who or " cut" in who
            limit = None if reduced else limits.get(precision)
            rows.append(
                {
                    "engine": who,
                    "precision": precision,
                    "batch": args.batch,
                    "ms": round(t.ms, 2),
                    "images_per_s": round(speed, 2),
                    "ratio": round(t.ratio, 2),
                    "max_logit_diff": None if expected is None else float(np.abs(runner.run(images) - expected).max()),
                    "noise": round(t.noise, 3),
                    "limit": None
                    if limit is None or " merge" in who or " cut" in who
                    else round(speed * flops / limit, 3),
                }
            )
    rows.sort(key=lambda row: -row["ratio"])
    result = {
        "model": args.model, "rows": rows, "missing": missing, "logit_std": float(reference.std()),
        "best_product_gflops": {k: round(v / 1e9, 1) for k, v in limits.items()},
        "machine": machine(), "versions": versions(),
    }  # fmt: skip
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def fastest(module: Any, source: Source, precision: str, folder: Path, images: np.ndarray) -> tuple[Runner, Setting]:
    """The engine's best setting by a quick probe."""
    folder.mkdir()
    module.make(source, precision, folder)
    best: tuple[float, Runner, Setting] | None = None
    for setting in module.settings(len(images), cores()):
        runner = module.load(folder, precision, setting)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            runner.run(images)
            times.append(time.perf_counter() - started)
        if best is None or min(times[1:]) < best[0]:
            best = (min(times[1:]), runner, setting)
    assert best is not None
    return best[1], best[2]


if __name__ == "__main__":
    main()
