"""The user's images as arrays a model takes, labelled with the model's own classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitkit.data.loader import make_loader
from vitkit.data.open import open_source
from vitkit.data.source import Source
from vitkit.errors import BadInput
from vitkit.models.io import ModelConfig


@dataclass(frozen=True)
class Images:
    """Two disjoint sets: one chooses quantization steps and temperature, one compares.

    Attributes:
        calibration, held: (N, C, H, W) float32 in [0, 1]. calibration_labels, held_labels: theirs.
    """

    calibration: np.ndarray
    calibration_labels: np.ndarray
    held: np.ndarray
    held_labels: np.ndarray


def read_images(data: str, config: ModelConfig, limit: int = 1000, calibration: int = 300) -> Images:
    """Images of a data set at a model's size and channels.

    Where the data say which images are for testing, the comparison uses those and the calibration the others; else a
    fixed random third is set aside, at most ``calibration`` images.

    Args:
        data: whatever :func:`vitkit.data.open_source` opens.
        config: of the model.
        limit: most images to compare on.
        calibration: most images to calibrate with.

    Raises: BadInput if the data hold fewer than 8 images or classes the model does not know.
    """
    source = open_source(data, task=config.task)  # type: ignore[arg-type]
    if len(source) < 8:
        raise BadInput(f"{data} holds {len(source)} images; comparing engines takes at least 8, better 500.")
    order = np.random.default_rng(0).permutation(len(source))
    tests = np.array([source.records[i].split == "test" for i in order])
    if tests.any() and not tests.all():
        first, rest = order[~tests], order[tests]
    else:
        count = min(calibration, len(order) // 3)
        first, rest = order[:count], order[count:]
    return images_at(source, first[:calibration], rest[:limit], config)


def images_at(source: Source, calibration: np.ndarray, held: np.ndarray, config: ModelConfig) -> Images:
    """The images with these numbers (N,) of a source, at a model's size and channels.

    Raises: BadInput if the source has classes the model does not know.
    """
    numbers = _own_numbers(source, config)
    chosen, chosen_labels = _read(source, calibration, config)
    others, other_labels = _read(source, held, config)
    if numbers is not None:
        chosen_labels, other_labels = numbers[chosen_labels], numbers[other_labels]
    return Images(chosen, chosen_labels, others, other_labels)


def _own_numbers(source: Source, config: ModelConfig) -> np.ndarray | None:
    """The model's number of each class of the data, which may list fewer or in another order."""
    if config.task != "classify" or not config.classes or tuple(source.classes) == tuple(config.classes):
        return None
    place = {name: i for i, name in enumerate(config.classes)}
    strange = [name for name in source.classes if name not in place]
    if strange:
        raise BadInput(
            f"{source.name} has the class {strange[0]!r}, which the model does not know; it knows "
            f"{', '.join(config.classes[:8])}{' …' if len(config.classes) > 8 else ''}."
        )
    return np.array([place[name] for name in source.classes])


def _read(source: Source, indices: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    loader = make_loader(source, np.sort(indices), config.image_size, config.in_chans, cache_mb=0, workers=0)
    batches = [(b["images"].numpy(), b["labels"].numpy()) for b in loader]
    return np.concatenate([i for i, _ in batches]), np.concatenate([t for _, t in batches])
