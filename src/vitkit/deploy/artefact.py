"""A deployed model: the engine's files, how to prepare images, what the outputs mean. Runs without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vitkit.deploy.engines import Runner, Setting, engine
from vitkit.deploy.faithful import probabilities
from vitkit.deploy.manifest import Manifest, read_manifest
from vitkit.errors import BadInput


class Artefact:
    """What :func:`load` returns; fits :class:`vitkit.deploy.served.Served`.

    Args:
        manifest: of the folder.
        runner: the loaded engine.
    """

    #: heat maps need gradients or attention weights, which an engine's graph does not give
    explainers: tuple[str, ...] = ()

    def __init__(self, manifest: Manifest, runner: Runner) -> None:
        self.manifest = manifest
        self.runner = runner
        self.name, self.task, self.labels = manifest.name, manifest.task, manifest.labels
        self.best_batch = max(1, int(manifest.setting.get("batch", 1)))

    def prepare(self, data: bytes, name: str) -> np.ndarray:
        """Bytes of an image file → (C, H, W) float32 in [0, 1].

        Raises: BadInput if it cannot be read.
        """
        from vitkit.data.decode import image_from_bytes

        m = self.manifest
        return image_from_bytes(data, name, m.image_size, m.in_chans, value_range=m.value_range, wide=m.wide)

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) in [0, 1] → logits (B, K).

        H and W are those of ``manifest.image_size`` (H, W), or others if the model was deployed with ``free_size``.

        Raises: BadInput if the images have another shape than the model takes.
        """
        images = np.ascontiguousarray(images, dtype=np.float32)
        m = self.manifest
        if (
            images.ndim != 4
            or images.shape[1] != m.in_chans
            or not self._takes_size(images.shape[2:])
            or not len(images)
        ):
            size = ", ".join(map(str, m.image_size))
            more = f" with H and W multiples of {m.side_step}" if m.side_step else ""
            raise BadInput(
                f"{self.name} takes images of shape (B, {m.in_chans}, {'H, W' if m.side_step else size}){more}; "
                f"got {images.shape}."
            )
        if m.takes == "pixels":
            images = to_pixels(images)
        return run_in_batches(self.runner, images, m.batch_sizes)

    def _takes_size(self, size: tuple[int, ...]) -> bool:
        step = self.manifest.side_step
        return all(n and n % step == 0 for n in size) if step else size == self.manifest.image_size

    def run_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Images as decoded, (B, H, W, C) uint8 of any height and width → logits (B, K).

        The engine cuts out the largest centred region of the model's shape and resizes it.

        Raises: BadInput if the pixels have another type or number of channels, or the model was deployed without
            ``bake``.
        """
        m = self.manifest
        if m.takes != "pixels":
            raise BadInput(f"{self.name} takes prepared images; deploy it with --bake to have its engine prepare them.")
        if pixels.ndim != 4 or pixels.dtype != np.uint8 or pixels.shape[3] != m.in_chans or not pixels.size:
            raise BadInput(
                f"{self.name} takes pixels of shape (B, H, W, {m.in_chans}) and type uint8; got {pixels.shape} of "
                f"{pixels.dtype}."
            )
        return run_in_batches(self.runner, np.ascontiguousarray(pixels), m.batch_sizes)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probabilities of logits; values of a regression stay as they are."""
        return probabilities(logits, self.task, self.manifest.temperature)

    def predict(self, images: list[str | Path]) -> list[dict[str, Any]]:
        """Label image files: ``{"image", "label", "probabilities"}``, or ``"values"`` for a regression.

        Raises: BadInput naming the first file that cannot be read.
        """
        rows = []
        for path in images:
            try:
                data = Path(path).read_bytes()
            except OSError as error:
                raise BadInput(f"{path} cannot be opened: {error.strerror or error}.") from error
            logits = self.run(self.prepare(data, str(path))[None])
            rows.append({"image": str(path), **answer(self.probabilities(logits)[0], self.labels, self.task)})
        return rows

    def explain(self, image: np.ndarray, method: str, target: int) -> np.ndarray:
        """Raises: BadInput, as an engine gives answers only."""
        raise BadInput(f"{self.name} runs in {self.manifest.engine}, which gives no heat maps; serve the model itself.")

    def describe(self) -> dict[str, Any]:
        """Engine, precision, sizes and measured figures."""
        m = self.manifest
        return {
            "engine": m.engine,
            "precision": m.precision,
            "image_size": list(m.image_size),
            "in_chans": m.in_chans,
            "temperature": m.temperature,
            **self.runner.describe(),
            "evidence": m.evidence,
        }


def load(folder: str | Path, verify: bool = True) -> Artefact:
    """Load a deployed model. Needs its engine and numpy, no torch (unless its engine is PyTorch).

    Args:
        folder: with ``manifest.json``.
        verify: check that no file was changed.

    Raises:
        BadInput: no artefact, a changed file, or one from a newer vitkit.
        MissingExtra: its engine is not installed; the message has the command.
    """
    manifest = read_manifest(folder, verify)
    module = engine(manifest.engine)
    missing = module.unavailable()
    if missing:
        raise BadInput(f"{folder} runs in {manifest.engine}: {missing}")
    runner = module.load(Path(folder), manifest.precision, Setting(**manifest.setting))
    return Artefact(manifest, runner)


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Images (B, C, H, W) in [0, 1] → 8-bit pixels (B, H, W, C), the very ones they were read from."""
    return np.ascontiguousarray(np.rint(images * 255).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def run_in_batches(runner: Runner, images: np.ndarray, batch_sizes: str | int) -> np.ndarray:
    """Run an engine that takes any number of images, or one that takes a fixed number (the last batch is padded)."""
    if isinstance(batch_sizes, str):
        return runner.run(images)
    size = batch_sizes
    short = -len(images) % size
    padded = np.concatenate([images, np.repeat(images[-1:], short, 0)]) if short else images
    parts = [runner.run(np.ascontiguousarray(padded[i : i + size])) for i in range(0, len(padded), size)]
    return np.concatenate(parts)[: len(images)]


def answer(values: np.ndarray, labels: tuple[str, ...], task: str) -> dict[str, Any]:
    """Probabilities (K,) of one image in words.

    >>> answer(np.array([0.25, 0.75]), ("cat", "dog"), "classify")
    {'label': 'dog', 'probabilities': {'cat': 0.25, 'dog': 0.75}}
    """
    names = labels or tuple(str(i) for i in range(len(values)))
    named = dict(zip(names, (float(v) for v in values)))
    if task == "regress":
        return {"values": named}
    if task == "multilabel":
        return {"label": [name for name, p in named.items() if p > 0.5], "probabilities": named}
    return {"label": max(named, key=lambda n: named[n]), "probabilities": named}
