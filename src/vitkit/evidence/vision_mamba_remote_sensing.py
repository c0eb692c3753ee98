"""Evidence for the survey of vision Mambas: what the scan order is worth, and how cost grows with the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.compress.cost import measure_latency, peak_memory
from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.ss2d import SS2D
from vitkit.models.parts.mixers.vim import Vim
from vitkit.models.scan_order import CROSS
from vitkit.models.vit import Attention
from vitkit.testing.worlds import World, fashion_mnist, fit_tiny, predict_logits, tiny_vit

NUM_TRAIN, NUM_TEST, EPOCHS, LR, BATCH = 1_500, 1_000, 6, 3e-3, 64
# one path walked four times costs what four paths cost, so that only the order differs
PATHS: dict[str, tuple[str, ...]] = {
    "rows, one way": ("raster",) * 4,
    "rows, both ways": ("raster", "raster_rev") * 2,
    "rows and columns, both ways": CROSS,
    "snakes, both ways": ("snake_h", "snake_v", "snake_h_rev", "snake_v_rev"),
    "Hilbert curve, both ways": ("gilbert", "gilbert_rev") * 2,
    "diagonals, both ways": ("diagonal", "antidiagonal", "diagonal_rev", "antidiagonal_rev"),
    "four shuffles": ("random:0", "random:1", "random:2", "random:3"),
}
FIRST, SECOND = "rows and columns, both ways", "rows, both ways"
_SIZE: dict[str, Any] = {"expand": 1, "d_state": 8}
_POOLED: dict[str, Any] = {"class_token": False, "global_pool": "avg"}
SIDES, WIDTH, REPEATS = (8, 16, 32, 64), 64, 5


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Callable[[str, int, int], None] | None = None) -> Evidence:
    """Train a tiny host per path set and seed; time one layer of each mixer at growing numbers of tokens."""
    arms = _arms()
    right: dict[str, list[Tensor]] = {name: [] for name in arms}
    done = 0
    for seed in seeds:
        world = fashion_mnist(NUM_TRAIN, NUM_TEST, seed=seed)
        for name, (options, _, _) in arms.items():
            if progress:
                progress(f"{name}, seed {seed}", done, len(seeds) * len(arms))
            right[name].append(_right(world, seed, options))
            done += 1
    # the test images differ between seeds, so the pairs are all of them
    pooled = {name: torch.cat(values).tolist() for name, values in right.items()}
    gaps = {name: paired(pooled[name], pooled[base]) for name, (_, base, _) in arms.items() if base}
    _, low, high = gaps[f"ss2d: {FIRST}"]
    costs = _costs()
    rows = [
        {
            "mixer": name,
            "test accuracy %": summarise([100 * float(r.mean()) for r in right[name]], 1),
            "ahead of rows both ways, points": "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in gaps[name]))
            if base
            else None,
            **(costs[cost] if cost else dict.fromkeys(costs["softmax"])),
        }
        for name, (_, base, cost) in arms.items()
    ]
    return Evidence(
        claim="At equal cost, scans along rows and columns are more accurate than scans along rows alone.",
        shown=True if low > 0 else False if high < 0 else None,
        rows=rows,
        notes=(
            "Intervals: 95 % bootstrap over the test images of all seeds. All sets of four paths have the same "
            "parameters and operations; the class token stands in the middle of every path and learns of the patches "
            "through the scans alone. Two rows read out the mean over patches in its place and are compared with each "
            "other; there the depthwise 3×3 convolution in front of the scans can do part of the work. Time and memory "
            f"are those of one layer of width {WIDTH} with 16 states for one image, forward only, without class token; "
            "the scans run in plain PyTorch, softmax in its fused kernel, which never stores the weights. The slope is "
            f"that of log time against log tokens between {SIDES[1] ** 2} and {SIDES[-1] ** 2} tokens: 1 is linear."
        ),
        settings={
            "data": f"Fashion-MNIST, {NUM_TRAIN} training and {NUM_TEST} test images a seed, no augmentation",
            "model": "2 blocks, 48 wide, 4×4 patches (49 tokens), position table",
            "scan": "inner width that of the tokens, 8 states (VMamba: twice the width, 16 states)",
            "epochs": EPOCHS,
            "optimizer": f"AdamW, lr {LR:g}, weight decay 0.05, cosine, batch {BATCH}",
        },
    )


def _arms() -> dict[str, tuple[dict[str, Any], str, str]]:
    """Options of the host, the arm it is compared with, and the layer whose cost it shows."""

    def ss2d(orders: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
        return "ss2d", {"orders": orders, "prefix": "middle", **_SIZE}

    base = f"ss2d: {SECOND}"
    arms: dict[str, tuple[dict[str, Any], str, str]] = {
        f"ss2d: {name}": ({"mixer": ss2d(orders)}, "" if name == SECOND else base, "ss2d" if name == FIRST else "")
        for name, orders in PATHS.items()
    }
    arms["vim"] = ({"mixer": ("vim", _SIZE)}, base, "vim")
    arms["softmax"] = ({}, base, "softmax")
    for name in (SECOND, FIRST):
        compared = "" if name == SECOND else f"ss2d: {SECOND}, mean over patches"
        arms[f"ss2d: {name}, mean over patches"] = ({"mixer": ss2d(PATHS[name]), **_POOLED}, compared, "")
    return arms


def _right(world: World, seed: int, options: dict[str, Any]) -> Tensor:
    """Which test images a freshly trained host gets right, (N,)."""
    model = tiny_vit(world.img_size, 4, world.in_chans, world.num_classes, seed, embed_dim=48, depth=2, **options)
    fit_tiny(model, world.x_train, world.y_train, EPOCHS, seed, batch=BATCH, lr=LR)
    return (predict_logits(model, world.x_test).argmax(-1) == world.y_test).double()


class _OnGrid(nn.Module):
    """A mixer as a function of the patch tokens alone."""

    def __init__(self, mixer: nn.Module, side: int) -> None:
        super().__init__()
        self.mixer, self.side = mixer, side

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, TokenLayout(grid=(self.side, self.side)))


def _costs() -> dict[str, dict[str, float]]:
    """Milliseconds, their growth, and MiB of one layer, by mixer."""
    times: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    for side in SIDES:
        grid = (side, side)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = {
                "softmax": _OnGrid(Attention(WIDTH, 4), side),
                "ss2d": _OnGrid(SS2D(WIDTH, grid=grid, num_prefix=0), side),
                "vim": _OnGrid(Vim(WIDTH, grid=grid), side),
            }
            x = torch.randn(1, side * side, WIDTH)
        for name, (median, _, _) in measure_latency(layers, x, REPEATS, warmup=1).items():
            times.setdefault(name, []).append(median)
        memory = {name: peak_memory(layer, x) / 2**20 for name, layer in layers.items()}
    growth = math.log((SIDES[-1] / SIDES[1]) ** 2)
    return {
        name: {
            **{f"ms at {side**2} tokens": round(ms, 2) for side, ms in zip(SIDES, values)},
            "slope": round(math.log(values[-1] / values[1]) / growth, 2),
            f"MiB at {SIDES[-1] ** 2} tokens": round(memory[name], 1),
        }
        for name, values in times.items()
    }
