"""Every mixer and normaliser against softmax attention: one layer of a ViT-Ti, the layers taking turns.

    python benchmarks/mixers.py [--tokens 197] [--dim 192] [--batch 8] [--rounds 30] [--threads 1] [--json FILE]

Ratios to the host's attention in its faster path, forward in eval mode. Target: Sinkhorn attention at most 2×. Parts
that do not run at this number of tokens (QontOT wants a power of two) are left out with their reason.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitkit.catalogue import methods
from vitkit.compress.cost import measure_latency
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Attention


def attention(dim: int, fused: bool, normalizer: nn.Module | None = None) -> Attention:
    layer = Attention(dim, num_heads=3, qkv_bias=True)
    layer.fused_attn, layer.normalizer = fused, normalizer
    return layer.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    side = math.isqrt(options.tokens - 1)
    layout = TokenLayout(grid=(side, side), prefix=(("class", 1),))
    tokens = side * side + 1
    spec = PartSpec(
        dim=options.dim, num_heads=3, head_dim=options.dim // 3, mlp_ratio=4.0, grid=(side, side), num_prefix=1,
        depth=0, num_blocks=1, image_size=(16 * side, 16 * side), patch_size=(16, 16), in_chans=3, num_classes=10,
    )  # fmt: skip
    x = torch.randn(options.batch, tokens, options.dim)
    calls: dict[str, Any] = {
        "softmax, fused": partial(attention(options.dim, True), layout=layout),
        "softmax, explicit": partial(attention(options.dim, False), layout=layout),
    }
    left_out: dict[str, str] = {}
    for name, method in methods().items():
        if method.entry.source != "vitkit" or method.slot not in ("normalizer", "mixer"):
            continue
        try:
            found = method.load()
            if method.slot == "normalizer":
                layer: nn.Module = attention(options.dim, False, found.from_standard(None, spec))
            else:
                layer = found.from_standard(attention(options.dim, True), spec).eval()
            one = partial(layer, layout=layout) if getattr(layer, "takes_layout", False) else layer
            with torch.inference_mode():
                one(x)
            calls[name] = one
        except ValueError as error:
            left_out[name] = str(error)
    times = measure_latency(calls, x, repeats=options.rounds, warmup=3)
    base = min(times["softmax, fused"][0], times["softmax, explicit"][0])
    rows = [
        {"layer": name, "ms": round(found[0], 3), "ratio": round(found[0] / base, 2)} for name, found in times.items()
    ]
    result = {
        "tokens": tokens, "dim": options.dim, "batch": options.batch, "rows": sorted(rows, key=lambda r: r["ms"]),
        "left_out": left_out, "machine": {"cpu": platform.machine(), "threads": options.threads},
        "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
