"""A model folder that a study exported, served by PyTorch as it stands, with heat maps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitkit.catalogue import methods, resolve
from vitkit.data.decode import image_from_bytes
from vitkit.deploy.faithful import probabilities
from vitkit.errors import VitkitError
from vitkit.models.io import load_model

_LARGEST_BATCH = 64
#: a batch this slow is not doubled any more: what it could gain would be paid in waiting
_SLOW_S = 0.4
#: up to here a larger batch need not be faster per image: it spares the server work
_QUICK_S = 0.1


class TorchModel:
    """Fits :class:`vitkit.deploy.served.Served`.

    Args:
        folder: of the model, with ``config.json`` and ``model.safetensors``.
        device: "cpu", "cuda" …; None takes a GPU if there is one.
        temperature: logits are divided by it before they become probabilities; 1 leaves the model's own.
        best_batch: images at a time; None measures what is fastest (about a second).

    Raises: BadInput when the folder holds no usable model.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str | None = None,
        temperature: float = 1.0,
        best_batch: int | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, self.config = load_model(folder)
        self.model = model.to(self.device).eval()
        self.temperature = temperature
        self.name, self.task, self.labels = Path(folder).resolve().name, self.config.task, self.config.classes
        self.best_batch = best_batch or self._fastest_batch()
        self.explainers = self._fitting_explainers()

    def prepare(self, data: bytes, name: str) -> np.ndarray:
        """Bytes of an image file → (C, H, W) float32 in [0, 1].

        Raises: BadInput if it cannot be read.
        """
        c = self.config
        return image_from_bytes(data, name, c.image_size, c.in_chans, value_range=c.value_range, wide=c.wide)

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) in [0, 1] → logits (B, K)."""
        with torch.inference_mode():
            return self.model(torch.from_numpy(images).to(self.device)).float().cpu().numpy()

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities of logits over the temperature; values of a regression stay as they are."""
        return probabilities(logits, self.task, self.temperature)

    def describe(self) -> dict[str, Any]:
        """Engine, precision, sizes and temperature."""
        return {
            "engine": f"PyTorch {torch.__version__}",
            "precision": "f32",
            "device": str(self.device),
            "network": self.config.base,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "image_size": list(self.config.image_size),
            "in_chans": self.config.in_chans,
            "temperature": self.temperature,
        }

    def explain(self, image: np.ndarray, method: str, target: int) -> np.ndarray:
        """Where the model looks for one output: (H, W) in [0, 1], the map's own smallest and largest score.

        Args:
            image: (C, H, W) in [0, 1].
            method: one of ``explainers``.
            target: index of the output.
        """
        from vitkit.explain.base import at_places, normalize, to_pixels

        images = torch.from_numpy(image)[None].to(self.device)
        found = resolve(method)(self.model, images, torch.tensor([target], device=self.device))
        heat = normalize(to_pixels(at_places(found.map), (image.shape[1], image.shape[2])))
        return heat[0].detach().float().cpu().numpy()

    def _blank(self, batch: int) -> np.ndarray:
        return np.full((batch, self.config.in_chans, *self.config.image_size), 0.5, np.float32)

    def _fastest_batch(self) -> int:
        self.run(self._blank(1))
        best, fastest, batch = 1, float("inf"), 1
        while batch <= _LARGEST_BATCH:
            images = self._blank(batch)
            seconds = min(self._seconds(images) for _ in range(3))
            each = seconds / batch
            if each < 0.95 * fastest or (each < 1.05 * fastest and seconds <= _QUICK_S):
                best = batch
            fastest = min(fastest, each)
            if seconds > _SLOW_S:
                break
            batch *= 2
        return best

    def _seconds(self, images: np.ndarray) -> float:
        started = time.perf_counter()
        self.run(images)
        return time.perf_counter() - started

    def _fitting_explainers(self) -> tuple[str, ...]:
        """The catalogue's explainers that this network allows; one that reads attention needs attention to read."""
        image, fitting = self._blank(1)[0], []
        for name, method in methods().items():
            if ".explain." not in method.dotted:
                continue
            try:
                self.explain(image, name, 0)
                fitting.append(name)
            except (TypeError, ValueError, LookupError, VitkitError):
                # these are how an explainer says that a network is not for it
                continue
        return tuple(fitting)
