"""Small seeded data sets and a tiny host to train on them: the ground every evidence run stands on."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, VitkitError

DATA_VARIABLE = "VITKIT_DATA"

FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True, kw_only=True)
class World:
    """A data set that fits in memory, already split.

    Attributes:
        name: what it is, e.g. ``"digits"``.
        x_train: training images (N, C, H, W), float32 in [0, 1].
        y_train: training labels (N,), int64.
        x_test: test images.
        y_test: test labels.
        classes: names of the classes, by label.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]

    @property
    def in_chans(self) -> int:
        return self.x_train.shape[1]

    @property
    def img_size(self) -> tuple[int, int]:
        return self.x_train.shape[2], self.x_train.shape[3]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


def digits(test_fraction: float = 0.25, seed: int = 0) -> World:
    """Scikit-learn's 1,797 handwritten digits of 8×8 pixels, split with equal class shares.

    >>> world = digits()
    >>> world.x_train.shape, world.x_test.shape, float(world.x_train.max())
    (torch.Size([1347, 1, 8, 8]), torch.Size([450, 1, 8, 8]), 1.0)

    Args:
        test_fraction: share of the images held out, in (0, 1).
        seed: of the split.

    Raises: BadInput if ``test_fraction`` is not a share.
    """
    from sklearn.model_selection import train_test_split

    if not 0 < test_fraction < 1:
        raise BadInput(f"test_fraction={test_fraction} must lie strictly between 0 and 1.")
    images, labels = _digits()
    train, test = train_test_split(np.arange(len(labels)), test_size=test_fraction, random_state=seed, stratify=labels)
    x, y = torch.from_numpy(images)[:, None], torch.from_numpy(labels)
    return World(
        name="digits",
        x_train=x[train],
        y_train=y[train],
        x_test=x[test],
        y_test=y[test],
        classes=tuple("0123456789"),
    )


def fashion_mnist(n_train: int = 10_000, n_test: int = 2_000, seed: int = 0) -> World:
    """A class-balanced draw from the shared Fashion-MNIST files: grey images of 28×28 pixels.

    Args:
        n_train: training images to draw; there are 20,000.
        n_test: test images to draw; there are 5,000.
        seed: of the draw.

    Raises:
        VitkitError: the data folder is not there. BadInput: more images asked for than exist.
    """
    arrays = _archive("fashion_mnist.npz")
    return _draw("fashion_mnist", arrays, FASHION_CLASSES, n_train, n_test, seed)


def cifar10(n_train: int = 5_000, n_test: int = 1_000, seed: int = 0) -> World:
    """A class-balanced draw from the shared CIFAR-10 subset: colour images of 32×32 pixels.

    Args:
        n_train: training images to draw; there are 5,000.
        n_test: test images to draw; there are 1,000.
        seed: of the draw.

    Raises:
        VitkitError: the data folder is not there. BadInput: more images asked for than exist.
    """
    arrays = _archive("cifar10_small.npz")
    return _draw("cifar10", arrays, tuple(str(c) for c in arrays["classes"]), n_train, n_test, seed)


def clutter_canvas(
    n: int, seed: int = 0, size: int = 32, digit_size: int = 12, num_distractors: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Digits somewhere on a canvas of distracting strokes, with the box where the digit is.

    The place is uniform over all positions that hold the whole digit. Distractors are 5×5 cuttings of other
    digits at 40–80 % brightness, so they look like strokes but carry no label; inside the box there are none.

    >>> images, labels, boxes = clutter_canvas(3)
    >>> images.shape, labels.shape, boxes.shape
    (torch.Size([3, 1, 32, 32]), torch.Size([3]), torch.Size([3, 4]))

    Args:
        n: number of images.
        seed: of digits, places and distractors; images of two seeds may show the same digit.
        size: side of the canvas, pixels.
        digit_size: side of the digit's box, pixels.
        num_distractors: cuttings on each canvas.

    Returns: images (n, 1, size, size) float32 in [0, 1]; labels (n,) int64; boxes (n, 4) int64, each
        ``x0, y0, x1, y1`` in pixels with the ends excluded.

    Raises: BadInput if the digit does not fit on the canvas.
    """
    if not 1 <= digit_size <= size or size < 5:
        raise BadInput(f"digit_size={digit_size} does not fit on a canvas of size={size}.")
    images, digit_labels = _digits()
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(images), size=n)
    digits_scaled = F.interpolate(
        torch.from_numpy(images[chosen])[:, None], size=(digit_size, digit_size), mode="bilinear"
    )[:, 0].numpy()
    corners = rng.integers(size - digit_size + 1, size=(n, 2))
    canvas = np.zeros((n, size, size), dtype=np.float32)
    row = np.arange(n)[:, None, None]
    cut = np.arange(5)
    for _ in range(num_distractors):
        source = rng.integers(len(images), size=n)[:, None, None]
        inside, place = rng.integers(4, size=(2, n, 1, 1)), rng.integers(size - 4, size=(2, n, 1, 1))
        light = rng.uniform(0.4, 0.8, size=(n, 1, 1)).astype(np.float32)
        piece = images[source, inside[0] + cut[:, None], inside[1] + cut] * light
        at = (row, place[0] + cut[:, None], place[1] + cut)
        canvas[at] = np.maximum(canvas[at], piece)
    side = np.arange(digit_size)
    y0, x0 = corners[:, :1, None], corners[:, 1:, None]
    canvas[row, y0 + side[:, None], x0 + side] = digits_scaled
    boxes = np.stack([corners[:, 1], corners[:, 0], corners[:, 1] + digit_size, corners[:, 0] + digit_size], axis=1)
    return torch.from_numpy(canvas)[:, None], torch.from_numpy(digit_labels[chosen]), torch.from_numpy(boxes)


def tiny_vit(
    img_size: int | tuple[int, int] = 28,
    patch_size: int = 4,
    in_chans: int = 1,
    num_classes: int = 10,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """The tiny host of all small experiments: D=64, 4 blocks, 4 heads, MLP ×2, Xavier-uniform weights.

    Args:
        img_size: side in pixels, or (height, width).
        patch_size: side of a patch in pixels.
        in_chans: image channels.
        num_classes: outputs of the head.
        seed: of the initial weights; the global random state is left as it was.
        options: slots (``mixer=…``, ``normalizer=…`` as in :func:`vitkit.build`) and arguments of timm's
            ``VisionTransformer`` that replace the defaults (``embed_dim``, ``depth``, ``reg_tokens``, …).
    """
    from vitkit.models.build import as_parts
    from vitkit.models.swap import SLOTS, swap
    from vitkit.models.vit import ViT

    slots = {k: options.pop(k) for k in list(options) if k in SLOTS}
    # timm's default init (std 0.02) suits widths of hundreds; at D=64 it wastes most of a short run
    shape = {"embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0, "weight_init": "jax"} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViT(img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=num_classes, **shape)
        for slot, value in slots.items():
            for part, part_options in as_parts(value):
                swap(model, slot, part, **part_options)
    return model


def train_tiny(world: World, epochs: int = 8, seed: int = 0, **options: Any) -> nn.Module:
    """A :func:`tiny_vit` of the world's size, trained on its training images by :func:`fit_tiny`.

    Args:
        world: what to train on.
        epochs: passes over the training images.
        seed: of weights and batch order.
        options: for :func:`tiny_vit`; ``patch_size`` is 2 for images of at most 16 pixels, else 4.
    """
    options.setdefault("patch_size", 2 if max(world.img_size) <= 16 else 4)
    model = tiny_vit(
        img_size=world.img_size,
        in_chans=world.in_chans,
        num_classes=world.num_classes,
        seed=seed,
        **options,
    )
    return fit_tiny(model, world.x_train, world.y_train, epochs=epochs, seed=seed)


def fit_tiny(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    seed: int = 0,
    batch: int = 128,
    lr: float = 1e-3,
    wd: float = 0.05,
    optimizer_factory: Callable[[list[dict[str, Any]], float], torch.optim.Optimizer] | None = None,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> nn.Module:
    """Train ``model`` in place with AdamW and a cosine schedule (5 % warm-up), and return it in eval mode.

    Equal seeds give equal batches for every model and optimizer, so arms of an experiment differ in nothing else.
    Auxiliary losses of parts are added to the loss.

    Args:
        model: images (B, C, H, W) → logits (B, K).
        x: training images (N, C, H, W).
        y: labels (N,), int64.
        epochs: passes over the images.
        seed: of the batch order and of dropout; the global random state is left as it was.
        batch: images a step; the last incomplete batch of an epoch is dropped unless it is the only one.
        lr: peak learning rate.
        wd: decoupled weight decay of tensors with two or more axes.
        optimizer_factory: ``f(param_groups, lr) -> optimizer`` in place of AdamW. Its ``step`` gets a closure
            that computes loss and gradients, so two-step optimizers such as SAM work unchanged.
        loss: ``f(model, images, labels) -> scalar`` in place of cross-entropy.
        progress: called as ``progress("train", epochs done, epochs)``.

    Raises: BadInput if there are no images or as many labels as images are not given.
    """
    from vitkit.models.vit import collect_aux

    if len(x) == 0 or len(x) != len(y):
        raise BadInput(f"fit_tiny got {len(x)} images and {len(y)} labels; it needs equally many, at least one.")
    groups = _decay_groups(model, wd)
    optimizer = optimizer_factory(groups, lr) if optimizer_factory else torch.optim.AdamW(groups, lr=lr)
    batch = min(batch, len(x))
    num_steps = len(x) // batch
    total = epochs * num_steps
    order = torch.Generator().manual_seed(seed)
    peak = [group["lr"] for group in optimizer.param_groups]
    compute = loss or _cross_entropy
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model.train()
        for epoch in range(epochs):
            permuted = torch.randperm(len(x), generator=order)
            for step in range(num_steps):
                at = permuted[step * batch : (step + 1) * batch]
                factor = _cosine(epoch * num_steps + step, total)
                for group, top in zip(optimizer.param_groups, peak):
                    group["lr"] = top * factor

                def closure(at: Tensor = at) -> Tensor:
                    optimizer.zero_grad(set_to_none=True)
                    with collect_aux(model) as aux:
                        value = compute(model, x[at], y[at])
                    value = value + sum(aux.values()) if aux else value
                    value.backward()
                    return value

                optimizer.step(closure)  # type: ignore[arg-type]
            if progress:
                progress("train", epoch + 1, epochs)
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


@torch.no_grad()
def predict_logits(model: nn.Module, x: Tensor, batch: int = 256) -> Tensor:
    """Logits (N, K) in eval mode, batch by batch; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        return torch.cat([model(part) for part in x.split(batch)])
    finally:
        model.train(was_training)


def predict_proba(model: nn.Module, x: Tensor, batch: int = 256) -> Tensor:
    """Class probabilities (N, K): the softmax of :func:`predict_logits`."""
    return predict_logits(model, x, batch).softmax(-1)


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 256) -> float:
    """Share of images whose largest logit is the label's, in [0, 1]."""
    return float((predict_logits(model, x, batch).argmax(-1) == y).double().mean())


def _cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def _decay_groups(model: nn.Module, wd: float) -> list[dict[str, Any]]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": wd},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def _cosine(step: int, total: int) -> float:
    warm = max(1, round(0.05 * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int64)


def data_folder() -> Path:
    """The folder of the shared archives: ``$VITKIT_DATA``, else ``../shared/data`` beside the project.

    Raises: VitkitError if there is none; the message says how to name one.
    """
    given = os.environ.get(DATA_VARIABLE)
    project = Path(__file__).resolve().parents[3]
    places = [Path(given)] if given else [root.parent / "shared" / "data" for root in (Path.cwd(), project)]
    for place in places:
        if place.is_dir():
            return place
    raise VitkitError(
        f"The folder with the shared data sets was not found (looked at {', '.join(map(str, places))}). "
        f"Set {DATA_VARIABLE} to the folder that holds fashion_mnist.npz and cifar10_small.npz, "
        "or use digits(), which needs no files."
    )


def _archive(name: str) -> dict[str, np.ndarray]:
    path = data_folder() / name
    if not path.is_file():
        raise VitkitError(f"{path} is missing; set {DATA_VARIABLE} to a folder that holds {name}.")
    return _read_archive(path)


@lru_cache(maxsize=2)
def _read_archive(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _draw(
    name: str, arrays: dict[str, np.ndarray], classes: tuple[str, ...], n_train: int, n_test: int, seed: int
) -> World:
    rng = np.random.default_rng(seed)
    parts: dict[str, Tensor] = {}
    for split, n in (("train", n_train), ("test", n_test)):
        labels = arrays[f"y_{split}"].astype(np.int64)
        at = _balanced(labels, n, rng, f"{name} {split}")
        pixels = torch.from_numpy(arrays[f"x_{split}"][at]).float() / 255
        parts[f"x_{split}"] = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        parts[f"y_{split}"] = torch.from_numpy(labels[at])
    return World(name=name, classes=classes, **parts)


def _balanced(labels: np.ndarray, n: int, rng: np.random.Generator, what: str) -> np.ndarray:
    """``n`` shuffled indices whose class counts differ by at most one."""
    if not 1 <= n <= len(labels):
        raise BadInput(f"{n} {what} images were asked for; there are {len(labels)}.")
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    # the first of every class, then the second of every class …: any prefix is balanced
    return rng.permutation(by_class[np.argsort(rank_in_class, kind="stable")][:n])
