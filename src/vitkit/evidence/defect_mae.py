"""Evidence for self-pretraining: masked autoencoding on the task's own images before training on its labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.explain.rollout import rollout
from vitkit.pretrain.defect_mae import DefectMAE
from vitkit.testing.worlds import accuracy, fit_tiny, tiny_vit

TRAIN, TEST, SIZE, PATCH = 900, 500, 48, 8
LABELLED, PRETRAIN_EPOCHS, EPOCHS = 300, 40, 20


def solder_joints(n: int, seed: int, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Discs with cracks and voids, as an acoustic microscope shows them.

    Returns: images (n, 1, size, size) in [0, 1]; class (n,) = quartile of cracked area; crack masks (n, size, size).
    """
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:size, :size] / size
    images, masks = np.empty((n, size, size)), np.zeros((n, size, size), bool)
    for i in range(n):
        cy, cx = 0.5 + rng.uniform(-0.08, 0.08, 2)
        radius = rng.uniform(0.3, 0.4)
        joint = (yy - cy) ** 2 + (xx - cx) ** 2 < radius**2
        # a crack grows from the rim inwards: the joint beyond a wavy chord
        angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.9) * radius
        along = (xx - cx) * np.cos(angle) + (yy - cy) * np.sin(angle)
        across = -(xx - cx) * np.sin(angle) + (yy - cy) * np.cos(angle)
        edge = radius - depth + 0.04 * np.sin(across * rng.uniform(15, 40) + rng.uniform(0, 6))
        crack = joint & (along > edge)
        image = 0.15 + 0.35 * joint + 0.35 * crack
        for _ in range(rng.integers(0, 6)):
            # round voids are bright as well, but no cracks
            vy, vx = cy + rng.uniform(-radius, radius), cx + rng.uniform(-radius, radius)
            image += 0.25 * (((yy - vy) ** 2 + (xx - vx) ** 2 < rng.uniform(0.02, 0.06) ** 2) & joint)
        images[i] = image * rng.uniform(0.7, 1.1) + 0.08 * rng.standard_normal((size, size))
        masks[i] = crack
    area = masks.mean((1, 2))
    # the quartiles of the generator itself, so that train and test share them
    classes = np.digitize(area, [0.045, 0.115, 0.21])
    return (
        torch.from_numpy(images.clip(0, 1)).float()[:, None],
        torch.from_numpy(classes).long(),
        torch.from_numpy(masks),
    )


class SmallCNN(nn.Sequential):
    """Four convolution layers, about as many parameters as the tiny ViT."""

    def __init__(self, num_classes: int = 4) -> None:
        layers: list[nn.Module] = []
        for a, b in ((1, 24), (24, 48), (48, 96), (96, 96)):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, num_classes))


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Callable[[str, int, int], None] | None = None) -> Evidence:
    """From scratch, self-pretrained, and a small CNN, all fine-tuned on the same few labels for the same steps."""
    arms = ("ViT from scratch", "ViT, self-MAE", "small CNN")
    scores: dict[str, list[float]] = {a: [] for a in arms}
    points: dict[str, list[float]] = {a: [] for a in arms[:2]}
    for s, seed in enumerate(seeds):
        x, y, _ = solder_joints(TRAIN, 1000 + seed)
        x_test, y_test, masks = solder_joints(TEST, 2000 + seed)
        hashes = {row.numpy().tobytes() for row in x}
        if any(row.numpy().tobytes() in hashes for row in x_test):
            raise RuntimeError("a test image is among the pretraining images")
        for i, arm in enumerate(arms):
            if progress is not None:
                progress(f"{arm}, seed {seed}", s * 3 + i, 3 * len(seeds))
            torch.manual_seed(seed)
            if arm == "small CNN":
                net: nn.Module = SmallCNN()
            else:
                net = tiny_vit(img_size=SIZE, patch_size=PATCH, num_classes=4, seed=seed)
            if arm == "ViT, self-MAE":
                objective = DefectMAE(net)
                fit_tiny(
                    objective, x, y, PRETRAIN_EPOCHS, seed, loss=lambda o, images, _: o({"images": images})["loss"]
                )
                net = objective.encoder()
            fit_tiny(net, x[:LABELLED], y[:LABELLED], EPOCHS, seed, batch=32)
            scores[arm].append(accuracy(net, x_test, y_test))
            if arm in points:
                points[arm].append(pointing_game(net, x_test[:200], masks[:200]))
    rows = []
    for arm in arms:
        mean, low, high = paired(scores[arm], scores[arms[0]])
        rows.append(
            {
                "arm": arm,
                "accuracy": summarise(scores[arm]),
                "minus scratch [95 %]": f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]",
                "rollout points at the crack": summarise(points[arm]) if arm in points else "–",
            }
        )
    _, low, high = paired(scores["ViT, self-MAE"], scores["ViT from scratch"])
    return Evidence(
        claim="Pretraining a ViT on the inspection images themselves beats the same ViT from scratch and a CNN.",
        shown=True if low > 0 else (False if high < 0 else None),
        rows=rows,
        notes=(
            "`shown` compares self-pretraining with the ViT from scratch, at equal fine-tuning; the CNN is printed "
            "beside it. The arm pretrained on natural images needs downloaded weights and is left out offline. The "
            "intervals are over seeds. Likely reason where it does not show: 900 scans are a tenth of the paper's, 40 "
            "epochs a tenth of its schedule, and the label is an area that targets with their brightness removed do "
            "not teach."
        ),
        settings={
            "data": f"synthetic solder joints {SIZE}×{SIZE}, class = quartile of the cracked area",
            "unlabelled": TRAIN,
            "labelled": LABELLED,
            "test": TEST,
            "pretrain epochs": PRETRAIN_EPOCHS,
            "fine-tune epochs": EPOCHS,
            "scaled down": "the paper has real scans, ViT-B/16 at 224 and 400–1,600 pretraining epochs",
        },
    )


def pointing_game(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Share of images with a crack whose rollout is largest in a patch that touches the crack."""
    heat = rollout(model, images).map.flatten(1)
    side = SIZE // PATCH
    touched = masks.unflatten(1, (side, PATCH)).unflatten(3, (side, PATCH)).any(4).any(2).flatten(1)
    cracked = touched.any(1)
    return float(touched[cracked].gather(1, heat[cracked].argmax(1, keepdim=True)).float().mean())
