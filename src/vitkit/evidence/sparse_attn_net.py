"""Whether a few chosen pixels are enough, and whether the scorer learns where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.compress.cost import count_flops
from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.models.backbones.sparse_attn_net import SparseAttnNet
from vitkit.models.pixel_selection import Selection, choose
from vitkit.testing.worlds import World, accuracy, digits, fit_tiny, tiny_vit

CANVAS, OBJECT, NUM_TRAIN, NUM_TEST, EPOCHS = 24, 12, 1000, 400, 12
LEARNED, RANDOM, BLIND = "learned pixels", "random pixels", "learned, without distillation"
# a pixel of the digit; the canvas around it is 0
INK = 0.1


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Callable[[str, int, int], None] | None = None) -> Evidence:
    """Digits in the middle of an empty canvas: accuracy, pixels used, and how many of these lie on the digit."""
    arms = (LEARNED, BLIND, RANDOM, "small CNN", "tiny ViT")
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    used: dict[str, list[float]] = {arm: [] for arm in arms}
    inside: dict[str, list[float]] = {arm: [] for arm in arms}
    size: dict[str, tuple[int, int]] = {}
    for i, seed in enumerate(seeds):
        world = digits(seed=seed)
        x_train, y_train = on_canvas(world.x_train[:NUM_TRAIN]), world.y_train[:NUM_TRAIN]
        x_test, y_test = on_canvas(world.x_test[:NUM_TEST]), world.y_test[:NUM_TEST]
        # random pixels are as many as the learned ones were in the same epoch
        plan: list[int] = []
        for j, arm in enumerate(arms):
            if progress:
                progress(f"train {arm}, seed {seed}", i * len(arms) + j, len(arms) * len(seeds))
            torch.manual_seed(seed)
            model = _model(arm, world, seed)
            counts = train(model, x_train, y_train, seed, plan if arm == RANDOM else None)
            plan = counts if arm == LEARNED else plan
            # which pixels an untrained choice takes in evaluation is drawn, too
            torch.manual_seed(seed)
            found[arm].append(accuracy(model, x_test, y_test))
            if isinstance(model, SparseAttnNet):
                chosen = model.select(x_test).to_map()
                used[arm].append(model.budget.share)
                inside[arm].append(float((chosen & (x_test[:, 0] > INK)).sum() / chosen.sum()))
            size[arm] = (sum(p.numel() for p in model.parameters()), count_flops(model, x_test[:1]))
    share_of_ink = float((on_canvas(digits().x_test) > INK).double().mean())
    rows = [
        {
            "model": arm,
            "accuracy": summarise(found[arm]),
            "share of pixels": summarise(used[arm]) if used[arm] else "all",
            "of these on the digit": summarise(inside[arm]) if inside[arm] else f"{share_of_ink:.3f}",
            "parameters": size[arm][0],
            "MFLOPs": f"{size[arm][1] / 1e6:.2f}",
        }
        for arm in arms
    ]
    gain, finds = paired(found[LEARNED], found[RANDOM]), paired(inside[LEARNED], inside[RANDOM])
    taught, rival = paired(inside[LEARNED], inside[BLIND]), paired(found[LEARNED], found["tiny ViT"])
    above, below = gain[1] > 0 and finds[1] > 0, gain[2] < 0 or finds[2] < 0
    return Evidence(
        claim="A learned choice of few pixels classifies better than a random one of the same number, on the object.",
        shown=True if above else False if below else None,
        rows=rows,
        notes=(
            f"Learned minus random pixels: accuracy {_interval(gain)}, share on the digit {_interval(finds)}; with "
            f"minus without distillation, share on the digit {_interval(taught)}; learned pixels minus tiny ViT, "
            f"accuracy {_interval(rival)} (95 % over {len(seeds)} seeds, which is few). `shown` asks for the first "
            "two. Random pixels are drawn anew for every image, as many as the learned ones in the same epoch, also in "
            "the test. The share of pixels is what the schedule ended at, from 0.3. Digits stand in the middle, so a "
            "random choice finds them at the rate of their ink, and a model could know their place without looking. "
            "FLOPs include the scorer; attention over pixels costs their number squared, so few pixels need not mean "
            "fewer FLOPs than a patch-based ViT has."
        ),
        settings={
            "data": f"digits, {OBJECT}×{OBJECT}, in the middle of an empty {CANVAS}×{CANVAS} canvas (paper: cells)",
            "train": NUM_TRAIN,
            "test": NUM_TEST,
            "epochs": EPOCHS,
            "optimizer": "AdamW, peak 3e-3, cosine, batch 64; the same for all",
            "network": "sparse_attn_net_femto: 64 wide, one layer; k compared every epoch (default: every second)",
        },
    )


def on_canvas(images: Tensor) -> Tensor:
    """Digits (N, 1, 8, 8), enlarged, in the middle of a black canvas."""
    large = F.interpolate(images, size=(OBJECT, OBJECT), mode="bilinear")
    before = (CANVAS - OBJECT) // 2
    after = CANVAS - OBJECT - before
    return F.pad(large, (before, after, before, after))


def train(model: nn.Module, x: Tensor, y: Tensor, seed: int, plan: list[int] | None) -> list[int]:
    """Train with the schedule of pixels, or with the numbers of ``plan``; the number of every epoch comes back."""
    budget = model.budget if isinstance(model, SparseAttnNet) else None
    losses: list[float] = []
    counts: list[int] = []

    def set_count(epoch: int) -> None:
        if budget is None:
            return
        if plan is None:
            budget.on_epoch(epoch, EPOCHS, sum(losses) / len(losses) if losses else None)
        else:
            budget.set(plan[epoch])
        counts.append(budget.count)
        losses.clear()

    def loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        value = F.cross_entropy(net(images), labels)
        losses.append(float(value.detach()))
        return value

    def ended(_: str, done: int, total: int) -> None:
        if done < total:
            set_count(done)

    set_count(0)
    fit_tiny(model, x, y, EPOCHS, seed, batch=64, lr=3e-3, loss=loss, progress=ended)
    return counts


class RandomPixels(SparseAttnNet):
    """The same network on pixels drawn evenly, with gates of its scorer."""

    def select(self, images: Tensor) -> Selection:
        scores = self.selector.scorer(images)
        size = (scores.shape[1], scores.shape[2])
        pixels = choose(torch.rand(len(images), size[0] * size[1]), self.budget.for_size(*size))
        return Selection(pixels, scores.flatten(1).gather(1, pixels), size)


def _model(arm: str, world: World, seed: int) -> nn.Module:
    if arm == "tiny ViT":
        return tiny_vit(CANVAS, 4, 1, world.num_classes, seed=seed)
    if arm == "small CNN":
        return _cnn(world.num_classes)
    options: dict[str, Any] = {"img_size": CANVAS, "in_chans": 1, "num_classes": world.num_classes, "every": 1}
    if arm == RANDOM:
        return RandomPixels(**options, distill=0.0)
    return SparseAttnNet(**options, distill=0.0 if arm == BLIND else 0.5)


def _cnn(num_classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for width_in, width in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def _interval(difference: tuple[float, float, float]) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)
