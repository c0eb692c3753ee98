"""Which convolutions of single tokens learn to attend as a ViT does, and what they would cost in light."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.models.diagnostics.attention_similarity import attention_similarity
from vitkit.models.diagnostics.optical4f import optical4f
from vitkit.testing.worlds import accuracy, fashion_mnist, fit_tiny, tiny_vit

NUM_TRAIN, NUM_TEST, NUM_MAPS, EPOCHS, DEPTH = 1500, 1000, 256, 8, 2
REFERENCE = "linear (the ViT)"
ARMS: dict[str, dict[str, Any] | None] = {
    "linear, other start": None,
    "valid, full kernel": {"kernel": "full"},
    "valid, half kernel": {"kernel": "half"},
    "same, 3×3": {"kernel": 3, "padding": "same"},
    "same, full kernel": {"kernel": "full", "padding": "same"},
}


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Callable[[str, int, int], None] | None = None) -> Evidence:
    """Train every form from scratch beside a linear ViT, and compare their attention with that ViT's."""
    names = [REFERENCE, *ARMS]
    columns = ("accuracy", "likeness", "cosine", "entropy")
    found: dict[str, dict[str, list[float]]] = {name: {c: [] for c in columns} for name in names}
    milliseconds: dict[str, str] = {}
    parameters: dict[str, int] = {}
    for i, seed in enumerate(seeds):
        world = fashion_mnist(NUM_TRAIN, NUM_TEST, seed)
        reference: nn.Module | None = None
        for j, name in enumerate(names):
            if progress:
                progress(f"train {name}, seed {seed}", i * len(names) + j, len(names) * len(seeds))
            model = _model(ARMS.get(name), seed + (0 if name == REFERENCE else 1000))
            fit_tiny(model, world.x_train, world.y_train, epochs=EPOCHS, seed=seed)
            reference = model if reference is None else reference
            like = attention_similarity(model, reference, world.x_test[:NUM_MAPS])
            found[name]["accuracy"].append(accuracy(model, world.x_test, world.y_test))
            found[name]["likeness"].append(like.centred)
            found[name]["cosine"].append(like.cosine)
            found[name]["entropy"].append(sum(row.entropy for row in like.rows) / len(like.rows))
            parameters[name] = sum(p.numel() for p in model.parameters())
            light = ARMS.get(name)
            milliseconds[name] = "–" if light is None else f"{1000 * optical4f(model, batch=64).seconds / 64:.2f}"
    rows = [
        {
            "projections and MLP": name,
            "parameters": parameters[name],
            "accuracy": summarise(found[name]["accuracy"]),
            "attention like the ViT's": summarise(found[name]["likeness"]),
            "plain cosine": summarise(found[name]["cosine"]),
            "entropy": summarise(found[name]["entropy"]),
            "ms an image in light (modelled)": milliseconds[name],
        }
        for name in names
    ]
    gaps = {
        (valid, same, what): paired(found[valid][what], found[same][what])
        for valid in ("valid, full kernel", "valid, half kernel")
        for same in ("same, 3×3", "same, full kernel")
        for what in ("likeness", "accuracy")
    }
    likeness = [gap for (valid, _, what), gap in gaps.items() if what == "likeness" and valid == "valid, full kernel"]
    above, below = all(gap[1] > 0 for gap in likeness), any(gap[2] < 0 for gap in likeness)
    said = "; ".join(
        f"{valid} − {same}, {'likeness' if what == 'likeness' else what}: {gap[0]:+.3f} [{gap[1]:+.3f}, {gap[2]:+.3f}]"
        for (valid, same, what), gap in gaps.items()
    )
    return Evidence(
        claim="Shared convolutions learn attention comparable to a ViT's if padding is valid, not if it is 'same'.",
        shown=True if above else False if below else None,
        rows=rows,
        notes=(
            f"{said} (95 % over {len(seeds)} seeds, which is few). `shown` speaks of the likeness of full valid "
            "kernels against both 'same' forms. Likeness is the cosine between class-token maps, minus their means, of "
            "a form and of the linear ViT of the same seed; the second row is a linear ViT from another start, so it "
            "is the most that can be expected. Full valid kernels are linear layers: that row repeats the second one "
            "up to the start of its weights. 'same' forms have far fewer weights, so accuracy compares forms, not "
            "sizes. Milliseconds come from a formula (4K plane, 2,000 frames a second, signed kernels, 64 images at a "
            "time), electronics left out; nothing optical was measured, and the paper's factor over a GPU is not "
            "tested here."
        ),
        settings={
            "data": "Fashion-MNIST (paper: CIFAR-100)",
            "train": NUM_TRAIN,
            "test": NUM_TEST,
            "epochs": EPOCHS,
            "host": f"tiny ViT: width 64 = 8×8, {DEPTH} blocks, patch 4, from scratch",
            "forms": "mixer conv-share and mlp conv-share-mlp in all blocks, fresh weights",
            "maps": f"{NUM_MAPS} test images",
        },
    )


def _model(form: dict[str, Any] | None, seed: int) -> nn.Module:
    slots: dict[str, Any] = {}
    if form is not None:
        slots = {
            "mixer": ("conv-share", {**form, "warm": False}),
            "mlp": ("conv-share-mlp", {**form, "warm": False}),
        }
    return tiny_vit(28, 4, 1, 10, seed=seed, depth=DEPTH, **slots)
