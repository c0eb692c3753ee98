"""Whether local contrast in place of intensities carries a ViT over to garments that are lit and coloured otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.testing.worlds import accuracy, fashion_mnist, fit_tiny, tiny_vit

NUM_TRAIN, NUM_TEST, EPOCHS = 2000, 1000, 6
SHIFTS = ("inverted", "brighter", "darker", "coloured background")


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Callable[[str, int, int], None] | None = None) -> Evidence:
    """Train on garments before black; test on the same and on four changed appearances, without retraining."""
    arms = {"intensities": None, "standardised image": None, "NeuRN, k=3": {"k": 3}, "NeuRN, k=5": {"k": 5}}
    found: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms}
    for i, seed in enumerate(seeds):
        world = fashion_mnist(NUM_TRAIN, NUM_TEST, seed)
        domains = {"as trained": world.x_test.expand(-1, 3, -1, -1)} | {
            shift: changed(world.x_test, shift, seed) for shift in SHIFTS
        }
        for j, (arm, options) in enumerate(arms.items()):
            if progress:
                progress(f"train {arm}, seed {seed}", i * len(arms) + j, len(arms) * len(seeds))
            prepare = standardise if arm == "standardised image" else _as_is
            slots: dict[str, Any] = {"tokenizer": ("neurn", options)} if options else {}
            model = tiny_vit(28, 4, 3, seed=seed, **slots)
            fit_tiny(model, prepare(world.x_train.expand(-1, 3, -1, -1)), world.y_train, epochs=EPOCHS, seed=seed)
            for domain, images in domains.items():
                right = accuracy(model, prepare(images), world.y_test)
                found[arm].setdefault(domain, []).append(right)
    unseen = {arm: [sum(found[arm][s][i] for s in SHIFTS) / len(SHIFTS) for i in range(len(seeds))] for arm in arms}
    rows = [
        {"the model sees": arm}
        | {domain: summarise(values) for domain, values in found[arm].items()}
        | {"mean of the changed": summarise(unseen[arm])}
        for arm in arms
    ]
    gain = paired(unseen["NeuRN, k=3"], unseen["intensities"])
    over = paired(unseen["NeuRN, k=3"], unseen["standardised image"])
    cost = paired(found["NeuRN, k=3"]["as trained"], found["intensities"]["as trained"])
    return Evidence(
        claim="NeuRN in front of a model raises its accuracy on domains it was not trained on.",
        shown=True if gain[1] > 0 else False if gain[2] < 0 else None,
        rows=rows,
        notes=(
            f"Accuracy on the four changed domains, NeuRN (k=3) minus intensities: {_interval(gain)}; minus the "
            f"standardised image, the stronger baseline: {_interval(over)}; on the domain it was trained on, minus "
            f"intensities: {_interval(cost)} (95 % over {len(seeds)} seeds, which is few). `shown` speaks of the "
            "first. Inversion leaves NeuRN's output as it is by its equation, so its accuracy there is that of the "
            "domain it was trained on; the brighter and darker images are clipped to [0, 1], which none of the arms "
            "can undo. Only appearance changes here, never shape, which is the case NeuRN was made for. After so few "
            "steps no arm has converged, and the standardised image is behind on its own domain too, so it is a weaker "
            "rival here than it would be after long training."
        ),
        settings={
            "data": "Fashion-MNIST as three equal channels",
            "train": NUM_TRAIN,
            "test": NUM_TEST,
            "epochs": EPOCHS,
            "host": "tiny ViT: width 64, 4 blocks, patch 4, from scratch",
            "domains": "inverted 1−x; brighter and darker: x ± 0.3, clipped; coloured background: one random colour an "
            "image behind the garment",
            "scaled down": "the paper goes between data sets of digits and natural images",
        },
    )


def changed(images: Tensor, shift: str, seed: int) -> Tensor:
    """Grey images (N, 1, H, W) in another domain, (N, 3, H, W) in [0, 1]."""
    x = images.expand(-1, 3, -1, -1)
    if shift == "inverted":
        return 1 - x
    if shift == "brighter":
        return (x + 0.3).clamp(max=1)
    if shift == "darker":
        return (x - 0.3).clamp(min=0)
    colour = torch.rand(len(x), 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    # the ground is black: what the garment does not cover takes the colour
    return x + (x == 0) * colour


def standardise(images: Tensor) -> Tensor:
    """Each image to mean 0 and deviation 1 over all its pixels and channels."""
    std, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
    return (images - mean) / std.clamp(min=1e-6)


def _as_is(images: Tensor) -> Tensor:
    return images


def _interval(difference: tuple[float, float, float]) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)
