"""What the prediction server asks of the model it serves."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Served(Protocol):
    """A model ready to answer. :class:`vitkit.deploy.Artefact` and
    :class:`vitkit.deploy.torch_model.TorchModel` fit.

    The server calls ``run``, ``probabilities`` and ``explain`` from one thread, ``prepare`` from several at once.

    Attributes:
        name: shown on the page.
        task: "classify", "multilabel" or "regress".
        labels: names of the outputs; without any they are called "0", "1", …
        best_batch: the number of images at a time it is fastest with.
        explainers: names of its heat-map methods, () when it has none.
    """

    name: str
    task: str
    labels: tuple[str, ...]
    best_batch: int
    explainers: tuple[str, ...]

    def prepare(self, data: bytes, name: str) -> np.ndarray:
        """Bytes of an image file → (C, H, W) float32 in [0, 1], one size for all images.

        Args:
            data: the file's bytes.
            name: for messages; never opened.

        Raises: BadInput if it cannot be read.
        """

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) in [0, 1] → logits (B, K)."""

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probabilities (B, K) of logits; values of a regression stay as they are."""

    def describe(self) -> dict[str, Any]:
        """Facts for people, fit for JSON: engine, precision, sizes, ``temperature`` of the calibration."""

    def explain(self, image: np.ndarray, method: str, target: int) -> np.ndarray:
        """Where the model looks for one output.

        Args:
            image: (C, H, W) in [0, 1].
            method: one of ``explainers``.
            target: index of the output.

        Returns: (H, W) float32 in [0, 1].

        Raises: BadInput if it cannot be told for this image.
        """
