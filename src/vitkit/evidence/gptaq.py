"""Does calibrating towards the full-precision network beat GPTQ at few bits, and more so in deeper blocks?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.compress.quantize.gptaq import gptaq
from vitkit.compress.quantize.gptq import gptq
from vitkit.compress.quantize.grid import Grid
from vitkit.compress.quantize.rtn import rtn
from vitkit.compress.quantize.solver import round_to_nearest, shifted_target, solve
from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.testing.worlds import fashion_mnist, fit_tiny, predict_logits, tiny_vit

Progress = Callable[[str, int, int], None]

TRAIN, TEST, CALIBRATION, EPOCHS, DEPTH, DIM = 4000, 1000, 256, 6, 4, 96
BITS = {"W3A4": (3, 4), "W2A8": (2, 8)}
METHODS: dict[str, Callable[..., tuple[nn.Module, object]]] = {
    "RTN": lambda m, x, w, a: rtn(m, x, w_bits=w, a_bits=a),
    "GPTQ": lambda m, x, w, a: gptq(m, x, w_bits=w, a_bits=a),
    "GPTAQ": lambda m, x, w, a: gptaq(m, x, w_bits=w, a_bits=a),
    "GPTAQ α=1": lambda m, x, w, a: gptaq(m, x, w_bits=w, a_bits=a, alpha=1.0),
    "shift": lambda m, x, w, a: gptaq(m, x, w_bits=w, a_bits=a, mode="shift"),
}


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Progress | None = None) -> Evidence:
    """Train a small ViT per seed, quantize it with each method, and compare accuracy, logits and layer errors."""
    figures: dict[tuple[str, str], list[dict[str, float]]] = {}
    full: list[float] = []
    done, total = 0, len(seeds) * (1 + len(BITS) * len(METHODS))
    for seed in seeds:
        world = fashion_mnist(TRAIN, TEST, seed=seed)
        model = tiny_vit(
            img_size=world.img_size, in_chans=1, num_classes=world.num_classes, seed=seed,
            patch_size=4, embed_dim=DIM, depth=DEPTH, num_heads=4,
        )  # fmt: skip
        fit_tiny(model, world.x_train, world.y_train, epochs=EPOCHS, seed=seed)
        logits = predict_logits(model, world.x_test)
        full.append(_top1(logits, world.y_test))
        done = _tell(progress, done, total)
        for setting, (w_bits, a_bits) in BITS.items():
            for name, method in METHODS.items():
                new, change = method(model, world.x_train[:CALIBRATION], w_bits, a_bits)
                figures.setdefault((setting, name), []).append(
                    _measure(new, change, logits, world.x_test, world.y_test)
                )
                done = _tell(progress, done, total)
    columns = ["top1", "kl", "error", *(f"block{i}" for i in range(DEPTH))]
    rows = [
        {"setting": setting, "method": name}
        | {c: summarise([f[c] for f in found], 4 if c != "top1" else 3) for c in columns}
        for (setting, name), found in figures.items()
    ]
    empty = dict.fromkeys(columns, "")
    rows.insert(0, {"setting": "float", "method": "unquantized"} | empty | {"top1": summarise(full)})
    rows += [
        {"setting": "linear layer W4", "method": name} | empty | {"error": summarise(values, 4)}
        for name, values in _synthetic(seeds).items()
    ]
    shown, notes = _verdict(figures)
    return Evidence(
        claim="At few bits GPTAQ keeps a ViT closer to the full-precision network than GPTQ and rounding to nearest.",
        shown=shown,
        rows=rows,
        notes=notes,
        settings={
            "data": f"Fashion-MNIST, {TRAIN} training and {TEST} test images",
            "model": f"ViT, {DEPTH} blocks of width {DIM}, patch 4, {EPOCHS} epochs",
            "calibration_images": CALIBRATION,
            "quantization": "per-channel asymmetric weights, clipping search, per-token inputs, act-order, damp 0.1",
            "scaled_down": "the paper quantizes DeiT-S/B and EVA-02-L at W4A4 with 128 ImageNet images",
            "linear_layer": "64→64, N=4096, inputs with correlated channels; X = X̃ + a linear image of X̃ + noise",
        },
    )


def _measure(new: nn.Module, change: object, logits: Tensor, images: Tensor, labels: Tensor) -> dict[str, float]:
    quantized = predict_logits(new, images)
    layers = change.details["layers"]  # type: ignore[attr-defined]
    errors = [row["error"] for row in layers]
    by_block = [[row["error"] for row in layers if row["block"] == i] for i in range(DEPTH)]
    return {
        "top1": _top1(quantized, labels),
        "kl": float(
            F.kl_div(quantized.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean")
        ),
        "error": sum(errors) / len(errors),
        **{f"block{i}": sum(part) / len(part) for i, part in enumerate(by_block)},
    }


def _verdict(figures: dict[tuple[str, str], list[dict[str, float]]]) -> tuple[bool | None, str]:
    """Shown if GPTQ's mean layer error exceeds GPTAQ's, and rounding's exceeds GPTQ's, at both settings."""
    intervals, notes = [], []
    for setting in BITS:
        for worse, better in (("GPTQ", "GPTAQ"), ("RTN", "GPTQ")):
            a, b = ([f["error"] for f in figures[setting, name]] for name in (worse, better))
            mean, low, high = paired(a, b)
            intervals.append((low, high))
            notes.append(f"{setting}: layer error {worse} − {better} = {mean:.4f} [{low:.4f}, {high:.4f}]")
        gaps = [
            sum(q[f"block{i}"] - g[f"block{i}"] for q, g in zip(figures[setting, "GPTQ"], figures[setting, "GPTAQ"]))
            / len(figures[setting, "GPTQ"])
            for i in range(DEPTH)
        ]
        notes.append(f"{setting}: GPTQ − GPTAQ by block " + ", ".join(f"{g:+.4f}" for g in gaps))
        ours, theirs = ([f["top1"] for f in figures[setting, name]] for name in ("GPTAQ", "GPTQ"))
        top1 = paired(ours, theirs)
        notes.append(f"{setting}: top-1 GPTAQ − GPTQ = {top1[0]:+.4f} [{top1[1]:+.4f}, {top1[2]:+.4f}]")
    if any(high < 0 for _, high in intervals):
        shown: bool | None = False
    else:
        shown = True if all(low > 0 for low, _ in intervals) else None
    head = (
        "error = ‖QX − WX̃‖²/‖WX̃‖² on the calibration images, mean over layers; the verdict rests on it, items are "
        "seeds. kl = KL(unquantized ‖ quantized) on test images. "
    )
    return shown, head + "; ".join(notes) + "."


def _synthetic(seeds: tuple[int, ...]) -> dict[str, list[float]]:
    """One layer whose input is wrong in a correlated way: losses without any network around it."""
    n, tokens, grid = 64, 4096, Grid(bits=4, clip_search=True)
    found: dict[str, list[float]] = {}
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(n, n, generator=g, dtype=torch.float64)
        mix = torch.eye(n, dtype=torch.float64) + torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
        x_full = mix @ torch.randn(n, tokens, generator=g, dtype=torch.float64)
        drift = 0.2 * torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
        x = x_full + drift @ x_full + 0.05 * torch.randn(n, tokens, generator=g, dtype=torch.float64)
        h, d = 2 * x @ x.T / tokens, 2 * (x_full - x) @ x.T / tokens
        target = weight @ x_full
        solutions = {
            "RTN": round_to_nearest(weight, grid),
            "GPTQ": solve(weight, h, None, grid, damp=0.01),
            "GPTAQ": solve(weight, h, d, grid, damp=0.01),
            "GPTAQ α=1": solve(weight, h, d, grid, damp=0.01, alpha=1.0),
            "shift": solve(shifted_target(weight, h, d, 0.01), h, None, grid, damp=0.01),
        }
        for name, solution in solutions.items():
            error = (solution.weight @ x - target).square().sum() / target.square().sum()
            found.setdefault(name, []).append(float(error))
    return found


def _top1(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).double().mean())


def _tell(progress: Progress | None, done: int, total: int) -> int:
    if progress:
        progress("gptaq", done + 1, total)
    return done + 1
