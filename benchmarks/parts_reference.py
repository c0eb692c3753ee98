"""Every part against a straightforward implementation of its own equations, the two taking turns.

    python benchmarks/parts_reference.py [--parts sinkhorn,vim] [--rounds 30] [--threads 1] [--json FILE]

One layer of a ViT-Ti (width 192, 3 heads, a grid of 14×14 and a class token, batch 8; read-outs see 12 blocks), forward
in eval mode. The references in ``references.py`` are the formulas in plain PyTorch with the part's own weights, all of
them moved away from their starting values, many of which are zero. Outputs must agree to 1e-4 of the reference's
largest value, or of 1 where that is smaller; ``max_diff`` is the largest difference. ``ratio`` is the median over
rounds of the part's time over the reference's. Target: at most 1.2. Freed memory stays with the process
(``memory.py``); without that the same convolutions took 1.3 times as long in one's turn as in the other's.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import references
import torch
from memory import keep_freed_memory
from timm.layers import PatchEmbed
from torch import Tensor, nn

from vitkit.catalogue import methods
from vitkit.compress.cost import measure_latency
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Attention, Block, Mlp, call

DIM, HEADS, BATCH, BLOCKS, CLASSES, PIXELS, PATCH = 192, 3, 8, 12, 1000, 224, 16
TOLERANCE = 1e-4
SLOTS = ("tokenizer", "position", "normalizer", "mixer", "mlp", "block", "readout")
#: what does not fit the 14×14 grid: dates for an attention over time, a power of two, no class token
LAYOUTS = {
    "stga": TokenLayout(grid=(4, 7, 7), prefix=(("class", 1),)),
    "qontot": TokenLayout(grid=(3, 5), prefix=(("class", 1),)),
    "edit": TokenLayout(grid=(14, 14)),
}
STANDARD = TokenLayout(grid=(14, 14), prefix=(("class", 1),))


class Case(NamedTuple):
    """A part in its place: the module(s), how it is called, what it is given."""

    part: Any
    run: Callable[[Tensor], Any]
    x: Tensor
    layout: TokenLayout


def spec_of(layout: TokenLayout, depth: int | None) -> PartSpec:
    h, w = layout.grid[-2:]
    return PartSpec(
        dim=DIM, num_heads=HEADS, head_dim=DIM // HEADS, mlp_ratio=4.0, grid=(h, w), num_prefix=layout.num_prefix,
        depth=depth, num_blocks=BLOCKS, image_size=(PATCH * h, PATCH * w), patch_size=(PATCH, PATCH), in_chans=3,
        num_classes=CLASSES,
    )  # fmt: skip


def standard(slot: str, depth: int = 0) -> nn.Module | None:
    """What a ViT-Ti has in the slot."""
    if slot == "tokenizer":
        return PatchEmbed(PIXELS, PATCH, 3, DIM)
    if slot == "mixer":
        return Attention(DIM, num_heads=HEADS, qkv_bias=True)
    if slot == "mlp":
        return Mlp(DIM, 4 * DIM)
    if slot == "block":
        return Block(DIM, HEADS, mlp_ratio=4.0, qkv_bias=True, attn_layer=Attention, mlp_layer=Mlp, depth=depth)
    return None


@torch.no_grad()
def trained(part: nn.Module) -> nn.Module:
    """In eval mode, with all weights moved a little, and running statistics that are those of some data."""
    for parameter in part.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    for module in part.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return part.eval()


def case_of(name: str, slot: str, cls: Any) -> Case:
    layout = LAYOUTS.get(name, STANDARD)
    tokens, images = layout.num_original + layout.num_prefix, torch.rand(BATCH, 3, PIXELS, PIXELS)
    x = torch.randn(BATCH, tokens, DIM)
    if name == "attention-reuse":
        pair = nn.ModuleList(cls.from_standard(standard("block", i), spec_of(layout, i)) for i in (0, 1))
        first, second = trained(pair).children()
        return Case(pair, lambda v: second(*first(v, layout))[0], x, layout)
    depth = 0 if slot in ("mixer", "mlp", "normalizer", "block") else None
    part: Any = trained(cls.from_standard(standard(slot), spec_of(layout, depth)))
    if slot == "tokenizer":
        return Case(part, lambda v: part(v)[0], images, layout)
    if slot == "normalizer":
        return Case(part, part, torch.randn(BATCH, HEADS, tokens, tokens), layout)
    if slot == "position":
        if hasattr(part, "embed"):
            layout = layout.replace(cond={"images": images})
            return Case(part, lambda v: part.embed(v, layout, images), x, layout)
        q_and_k = torch.randn(2, BATCH, HEADS, tokens, DIM // HEADS)
        turn_or_add = part.rotate if hasattr(part, "rotate") else part.bias
        return Case(part, lambda v: turn_or_add(v[0], v[1], layout), q_and_k, layout)
    if slot == "block":
        return Case(part, lambda v: part(v, layout)[0], x, layout)
    if slot == "readout":
        states = torch.randn(BLOCKS, BATCH, tokens, DIM)
        return Case(part, lambda v: part([(state, layout) for state in v], layout), states, layout)
    return Case(part, lambda v: call(part, v, layout), x, layout)


def measure(name: str, slot: str, cls: Any, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    part, run, x, layout = case_of(name, slot, cls)
    reference = getattr(references, name.replace("-", "_"))
    with torch.inference_mode():
        # the part first: it may choose something at its first batch, as qontot does its gain
        ours, theirs = (torch.stack(f) if isinstance(f, tuple) else f for f in (run(x), reference(part, x, layout)))
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not difference <= TOLERANCE * max(1.0, largest):
        raise SystemExit(f"{name} and its reference differ by {difference:.2g}; the largest value is {largest:.2g}.")
    calls = {"reference": lambda v: reference(part, v, layout), "part": run}
    times = measure_latency(calls, x, repeats=rounds, warmup=2)
    return {
        "part": name, "slot": slot, "ms": round(times["part"][0], 3), "reference_ms": round(times["reference"][0], 3),
        "ratio": round(times["part"][2], 2), "max_diff": float(f"{difference:.1g}"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", help="names, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    wanted = options.parts.split(",") if options.parts else None
    rows: list[dict[str, object]] = []
    left_out: dict[str, str] = {}
    print(f"{'part':24}{'slot':12}{'ms':>9}{'reference':>11}{'ratio':>7}{'max diff':>10}")
    for slot in SLOTS:
        for name, method in methods().items():
            if method.entry.source != "vitkit" or method.slot != slot or (wanted and name not in wanted):
                continue
            try:
                row = measure(name, slot, method.load(), options.rounds)
            except ValueError as error:
                left_out[name] = str(error)
                continue
            rows.append(row)
            print(
                f"{name:24}{slot:12}{row['ms']:9.3f}{row['reference_ms']:11.3f}{row['ratio']:7.2f}{row['max_diff']:10.0e}",
                flush=True,
            )
    result = {
        "dim": DIM, "tokens": 197, "batch": BATCH, "rows": rows, "left_out": left_out, "target": 1.2,
        "machine": {"cpu": platform.machine(), "threads": options.threads}, "torch": torch.__version__,
    }  # fmt: skip
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
