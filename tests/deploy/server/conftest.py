from __future__ import annotations

import io
import threading

import numpy as np
import pytest
from PIL import Image

from vitkit.data.decode import image_from_bytes


class Colours:
    """Says which colour an image has most of; counts its batches and can be held up."""

    name, task, labels, best_batch = "colours", "classify", ("red", "green", "blue"), 4
    explainers = ("left-half", "nothing")

    def __init__(self):
        self.batches: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.started = threading.Event()
        self.fault: Exception | None = None

    def prepare(self, data, name):
        return image_from_bytes(data, name, (8, 12), 3)

    def run(self, images):
        self.batches.append(len(images))
        self.started.set()
        assert self.go.wait(30)
        if self.fault is not None:
            raise self.fault
        return images.mean((2, 3)) * 10

    def probabilities(self, logits):
        if self.task == "regress":
            return logits
        if self.task == "multilabel":
            return logits / 10
        raised = np.exp(logits - logits.max(1, keepdims=True))
        return raised / raised.sum(1, keepdims=True)

    def describe(self):
        return {"engine": "numpy", "image_size": [8, 12], "temperature": 1.5}

    def explain(self, image, method, target):
        heat = np.zeros(image.shape[1:], np.float32)
        if method == "left-half":
            heat[:, : heat.shape[1] // 2] = 1
        return heat


@pytest.fixture
def served():
    made = Colours()
    yield made
    made.go.set()


def encoded(colour: tuple[int, int, int], size: tuple[int, int] = (12, 8), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def red() -> bytes:
    return encoded((200, 10, 10))


@pytest.fixture(scope="session")
def blue() -> bytes:
    return encoded((10, 10, 200), kind="JPEG")
