"""Does doubly stochastic attention, and the quantum circuit in particular, beat softmax on small images?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vitkit.anatomy import Trace, untouched
from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.models.diagnostics import attention_entropy, birkhoff_distance, dsm_error, expressivity
from vitkit.models.parts.normalizers.normsoftmax import NormSoftmax
from vitkit.models.parts.normalizers.qontot import QontOT
from vitkit.models.parts.normalizers.qr import QROrthostochastic
from vitkit.models.parts.normalizers.sinkhorn import Sinkhorn
from vitkit.models.parts.normalizers.softmax import Softmax
from vitkit.models.parts.tokenizers.row_stripes import RowStripes
from vitkit.testing.worlds import World, digits, fit_tiny, predict_logits, tiny_vit

EPOCHS = 30
# the states of so small a circuit fit in memory, so nothing is computed twice
_CIRCUIT = {"ancillas": 1, "layers": 8, "recompute": False}
ARMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "softmax": (Softmax, {}),
    "normsoftmax": (NormSoftmax, {}),
    "sinkhorn k=3": (Sinkhorn, {"steps": 3}),
    "sinkhorn k=21": (Sinkhorn, {"steps": 21}),
    "qr": (QROrthostochastic, {}),
    "qontot": (QontOT, _CIRCUIT),
}


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Callable[[str, int, int], None] | None = None) -> Evidence:
    """Train one tiny ViT per normalizer and seed on digits cut into overlapping row pairs.

    Args:
        seeds: of weights and batch order.
        progress: called as ``progress("normalizer, seed", runs done, runs)``.
    """
    world = digits()
    correct: dict[str, list[torch.Tensor]] = {}
    rows = []
    for index, (name, arm) in enumerate(ARMS.items()):
        figures: dict[str, list[float]] = {key: [] for key in ("rows", "columns", "distance", "entropy", "seconds")}
        correct[name] = []
        for done, seed in enumerate(seeds):
            if progress is not None:
                progress(f"{name}, seed {seed}", index * len(seeds) + done, len(ARMS) * len(seeds))
            started = time.perf_counter()
            model = _train(world, arm, seed)
            figures["seconds"].append((time.perf_counter() - started) / EPOCHS)
            hits = predict_logits(model, world.x_test).argmax(-1) == world.y_test
            correct[name].append(hits.double())
            for key, value in _measure(model, world).items():
                figures[key].append(value)
        rows.append(_row(name, correct, figures, arm))
    _, low, high = paired(_per_image(correct["qontot"]), _per_image(correct["softmax"]))
    return Evidence(
        claim=(
            "A ViT whose attention is made doubly stochastic by a (static) quantum circuit classifies small images "
            "better than one with softmax attention."
        ),
        shown=True if low > 0 else False if high < 0 else None,
        rows=rows,
        notes=(
            "vs_softmax: difference of accuracy in points, with a 95 % interval over test images (an image's value is "
            "its mean over seeds). row_error and column_error: summed absolute deviation from 1 of one 8×8 matrix; "
            "birkhoff: Frobenius distance to the nearest doubly stochastic matrix; entropy in nats, at most ln 8 = "
            "2.08; all on the trained models' attention on test images. distinct: different outputs of the untrained "
            "normalizer on the 65,536 binary 4×4 score matrices. The host is not tuned for any arm."
        ),
        settings={
            "data": "digits (1,347 train, 450 test)",
            "tokens": "7 overlapping pairs of rows + class token",
            "model": "2 blocks, D=32, 2 heads, MLP ×2, class-token read-out",
            "epochs": EPOCHS,
            "qontot": "1 ancilla, 8 layers, static, sd(gain·S)=0.3 (paper: up to 4 ancillas, 16 layers)",
            "scaled_down": "the paper trains on MNIST, Fashion-MNIST and MedMNIST",
        },
    )


def _train(world: World, arm: tuple[Any, dict[str, Any]], seed: int) -> nn.Module:
    part, options = arm
    model = tiny_vit(
        img_size=world.img_size,
        patch_size=2,
        num_classes=world.num_classes,
        seed=seed,
        embed_dim=32,
        depth=2,
        num_heads=2,
        tokenizer=(RowStripes, {"window": 2, "stride": 1}),
        normalizer=(part, {**options, "seed": seed} if part is QontOT else options),
    )
    return fit_tiny(model, world.x_train, world.y_train, epochs=EPOCHS, seed=seed)


@torch.no_grad()
def _measure(model: nn.Module, world: World) -> dict[str, float]:
    with untouched(model), Trace(model, ["blocks.*.attn.weights"]) as trace:
        model(world.x_test)
    weights = torch.cat(trace.stack("attn.weights"))
    error = dsm_error(weights)
    # Dykstra is exact but slow: 64 images say enough about a mean
    distance = birkhoff_distance(torch.cat([w[:64] for w in trace.stack("attn.weights")]), tol=1e-5)
    return {
        "rows": float(error.rows.mean()),
        "columns": float(error.columns.mean()),
        "distance": float(distance.mean()),
        "entropy": float(attention_entropy(weights).mean()),
    }


def _row(
    name: str, correct: dict[str, list[torch.Tensor]], figures: dict[str, list[float]], arm: tuple[Any, dict[str, Any]]
) -> dict[str, Any]:
    accuracies = [float(hits.mean()) for hits in correct[name]]
    gain, low, high = (100 * value for value in paired(_per_image(correct[name]), _per_image(correct["softmax"])))
    part, _ = arm
    normalizer = QontOT(4, ancillas=1, gain=1.0) if part is QontOT else part(**arm[1])
    return {
        "normalizer": name,
        "accuracy": summarise(accuracies),
        "vs_softmax": f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]",
        "row_error": round(_mean(figures["rows"]), 6),
        "column_error": round(_mean(figures["columns"]), 4),
        "birkhoff": round(_mean(figures["distance"]), 4),
        "entropy": round(_mean(figures["entropy"]), 3),
        "distinct": expressivity(normalizer, 4),
        "s_per_epoch": round(_mean(figures["seconds"]), 2),
    }


def _per_image(hits: list[torch.Tensor]) -> list[float]:
    return torch.stack(hits).mean(0).tolist()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
