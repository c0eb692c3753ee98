"""Graph and hypergraph mixers against a global kNN graph: making the graph, and a whole layer, interleaved.

    python benchmarks/graph_mixers.py [--tokens 49 196 784] [--dim 192] [--batch 8] [--rounds 12] [--device cpu]
                                      [--json FILE]

Milliseconds an image. DEGC makes 4 clusters, 6 from 784 tokens on; k-means counts as making its graph. Hyper-pool makes
no graph ahead of its layer. Target: at 784 tokens both graphs are made faster than a global kNN graph. DEGC's layer has
half as many weights again as that of the kNN graph, for the centroids, so that it gains less as a whole.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from vitkit.evidence.clustervig import image_like, in_turn
from vitkit.models.graph import cluster_knn, kmeans, knn
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.degc import DEGC
from vitkit.models.parts.mixers.hyper_pool import HyperPool
from vitkit.models.parts.mixers.hypergraph import HypergraphAttention
from vitkit.models.vit import Attention


@torch.no_grad()
def measure(num_tokens: int, dim: int, batch: int, rounds: int, device: torch.device) -> list[dict[str, object]]:
    side = round(num_tokens**0.5)
    if side * side != num_tokens:
        raise SystemExit(f"--tokens {num_tokens} is no square number; use for example 49, 196, 784 or 3136.")
    x, layout = image_like(batch, side, dim).to(device), TokenLayout(grid=(side, side))
    clusters, heads = 6 if num_tokens >= 784 else 4, max(1, dim // 64)
    hypergraph = HypergraphAttention(dim, heads, centers=16, k=8).eval().to(device)
    layers: dict[str, nn.Module] = {
        "softmax attention": Attention(dim, num_heads=heads),
        "global kNN graph": DEGC(dim, 1, 9, centroids=False),
        "DEGC": DEGC(dim, clusters, 9),
        "hypergraph": hypergraph,
        "hyper-pool": HyperPool(dim, heads, 16),
    }
    ready = {name: layer.eval().to(device) for name, layer in layers.items()}
    makers: dict[str, Callable[[], object]] = {
        "global kNN graph": lambda: knn(x, 9),
        "DEGC": lambda: cluster_knn(x, kmeans(x, clusters)[0], clusters, 9),
        "hypergraph": lambda: hypergraph.hypergraph(x, layout),
    }
    made = dict(zip(makers, in_turn(list(makers.values()), rounds, device.type)))
    run = dict(zip(ready, in_turn([partial(layer, x, layout) for layer in ready.values()], rounds, device.type)))
    return [
        {
            "tokens": num_tokens,
            "mixer": name,
            "graph_ms": round(made[name] / batch, 4) if name in made else None,
            "graph_speedup": round(made["global kNN graph"] / made[name], 2) if name in made else None,
            "layer_ms": round(run[name] / batch, 4),
            "layer_speedup": round(run["global kNN graph"] / run[name], 2),
        }
        for name in layers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[49, 196, 784])
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = [row for n in args.tokens for row in measure(n, args.dim, args.batch, args.rounds, device)]
    on = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    result = {
        "dim": args.dim,
        "batch": args.batch,
        "k": 9,
        "rows": rows,
        "machine": {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else on,
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
