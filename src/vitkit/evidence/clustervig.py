"""What neighbours within clusters cost and are worth against neighbours among all patches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.models.graph import cluster_knn, kmeans, knn
from vitkit.testing.worlds import accuracy, fashion_mnist, fit_tiny, tiny_vit

NUM_TRAIN, NUM_TEST, EPOCHS, DEPTH, PATCH = 1200, 1000, 4, 2, 2
#: tokens → images a call; from 784 tokens on there are 6 clusters, below 4
TOKENS = {49: 16, 196: 8, 784: 4, 3136: 1}
WIDTH, NEIGHBOURS, ROUNDS = 192, 9, 9


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Callable[[str, int, int], None] | None = None) -> Evidence:
    """Train a tiny ViT with three mixers, and time how the graphs of two of them are made."""
    arms: dict[str, dict[str, Any]] = {
        "softmax attention": {},
        "global kNN graph": {"mixer": ("degc", {"clusters": 1, "centroids": False})},
        "DEGC": {"mixer": "degc"},
    }
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    weights: dict[str, int] = {}
    total = len(seeds) * len(arms) + 1
    for i, seed in enumerate(seeds):
        world = fashion_mnist(NUM_TRAIN, NUM_TEST, seed)
        for j, (arm, options) in enumerate(arms.items()):
            if progress:
                progress(f"train {arm}, seed {seed}", i * len(arms) + j, total)
            model = tiny_vit(28, PATCH, 1, seed=seed, depth=DEPTH, **options)
            fit_tiny(model, world.x_train, world.y_train, epochs=EPOCHS, seed=seed, batch=64)
            found[arm].append(accuracy(model, world.x_test, world.y_test))
            weights[arm] = sum(p.numel() for p in model.parameters())
    if progress:
        progress("time the graphs", total - 1, total)
    times = {n: graph_times(n, batch) for n, batch in TOKENS.items()}
    speedup = {n: globally / clustered for n, (globally, clustered) in times.items()}
    worse = paired(found["DEGC"], found["global kNN graph"])
    rising = all(a < b for a, b in zip(list(speedup.values()), list(speedup.values())[1:]))
    quick = rising and speedup.get(784, 0.0) > 1
    rows = [
        {"what": arm, "accuracy": summarise(values), "parameters": weights[arm], "kNN, ms": "–", "DEGC, ms": "–"}
        | {"kNN / DEGC": "–"}
        for arm, values in found.items()
    ]
    rows += [
        {"what": f"graph of {n} tokens", "accuracy": "–", "parameters": "–"}
        | {"kNN, ms": round(times[n][0], 3), "DEGC, ms": round(times[n][1], 3), "kNN / DEGC": round(speedup[n], 2)}
        for n in TOKENS
    ]
    return Evidence(
        claim="Graphs within clusters are made faster than a global kNN graph, the more so the more tokens, and are "
        "no less accurate.",
        shown=quick and worse[2] >= 0,
        rows=rows,
        notes=(
            "`shown` asks for a rising ratio that is above 1 at 784 tokens and an accuracy that is not reliably lower. "
            "DEGC minus global kNN: {:+.3f} [{:+.3f}, {:+.3f}] (95 %). ".format(*worse)
            + "Times are of making the graph on one CPU, k-means included, for an image. With few tokens k-means costs "
            "more than it saves. The published factor of 5 is end to end, on a GPU, with other implementations. DEGC "
            "has more parameters, those of its centroids."
        ),
        settings={
            "data": f"Fashion-MNIST, patch {PATCH} (196 tokens), width 64, {DEPTH} blocks, 4 clusters",
            "train": NUM_TRAIN,
            "test": NUM_TEST,
            "epochs": EPOCHS,
            "timing": f"width {WIDTH}, {NEIGHBOURS} neighbours, 4 clusters, from 784 tokens on 6; {ROUNDS} rounds",
            "scaled down": "the paper trains 12 to 16 blocks of width 192 to 640 on ImageNet-1K",
        },
    )


def graph_times(num_tokens: int, batch: int) -> tuple[float, float]:
    """Milliseconds an image for the global kNN graph, and for clusters with the neighbours in them."""
    x, clusters = image_like(batch, round(num_tokens**0.5), WIDTH), 6 if num_tokens >= 784 else 4
    took = in_turn(
        [lambda: knn(x, NEIGHBOURS), lambda: cluster_knn(x, kmeans(x, clusters)[0], clusters, NEIGHBOURS)], ROUNDS
    )
    return took[0] / batch, took[1] / batch


def image_like(batch: int, side: int, width: int) -> Tensor:
    """Tokens (B, side², D) whose neighbours are alike, as those of images are; noise alone has no clusters."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, width, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noisy = smooth + 0.5 * torch.randn(batch, width, side, side, generator=generator)
    return noisy.flatten(2).transpose(1, 2).contiguous()


def in_turn(calls: list[Callable[[], object]], rounds: int, device: str = "cpu") -> list[float]:
    """Median milliseconds of each call; they take turns, so that a busy moment hits all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(-2, rounds):
        for call, taken in zip(calls, times):
            started = time.perf_counter()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            if i >= 0:
                taken.append(1e3 * (time.perf_counter() - started))
    return [statistics.median(taken) for taken in times]
