"""Named data sets, with stand-ins for what would be downloaded."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from vitkit.data import make_loader, open_source, split
from vitkit.errors import BadInput, MissingExtra, UnknownName


class Pretend:
    """Shaped like a torchvision data set."""

    classes = ["plane", "car"]

    def __init__(self, root, train=True, download=False):
        self.targets = [i % 2 for i in range(20 if train else 6)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return Image.new("RGB", (8, 6), (i, 0, 0)), self.targets[i]


class Offline:
    def __init__(self, root, train=True, download=False):
        raise OSError("Name or service not known\nmore lines")


def test_torchvision(monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets, "CIFAR10", Pretend)
    source = open_source("torchvision:CIFAR10")
    assert (len(source), source.classes, source.in_chans, source.image_size) == (26, ("plane", "car"), 3, (6, 8))
    assert source.records[25].split == "test" and source.read(23)[0, 0].tolist() == [3, 0, 0]
    [fold] = split(source)
    assert fold.test.tolist() == list(range(20, 26))
    batch = next(iter(make_loader(source, fold.train, (6, 8), 3, workers=0, cache_mb=0)))
    assert batch["images"].shape[1:] == (3, 6, 8)
    assert source.mirror
    monkeypatch.setattr(datasets, "MNIST", Pretend)
    assert not open_source("torchvision:mnist").mirror


def test_torchvision_offline_and_unknown(monkeypatch):
    from torchvision import datasets

    monkeypatch.setattr(datasets, "CIFAR10", Offline)
    with pytest.raises(BadInput, match=r"torchvision:CIFAR10 could not be had \(Name or service not known\).*network"):
        open_source("torchvision:CIFAR10")
    with pytest.raises(UnknownName, match="Did you mean 'CIFAR10'"):
        open_source("torchvision:CIFAR11")


class Column(list):
    @property
    def features(self):
        return FEATURES


ClassLabel = type("ClassLabel", (), {"names": ["no", "yes"]})
FEATURES = {"image": type("Image", (), {})(), "label": ClassLabel()}


class Rows:
    features = FEATURES

    def __init__(self, n):
        self.rows = [{"image": Image.fromarray(np.full((5, 7), i, np.uint8)), "label": i % 2} for i in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return self.rows[key] if isinstance(key, int) else [r[key] for r in self.rows]


def fake_hub(monkeypatch, load):
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hugging_face(monkeypatch):
    asked = []

    def load(name, configuration, cache_dir):
        asked.append((name, configuration))
        return {"train": Rows(10), "validation": Rows(4), "test": Rows(4), "unlabelled": Rows(3)}

    fake_hub(monkeypatch, load)
    source = open_source("hf:someone/things:small")
    assert asked == [("someone/things", "small")]
    assert (len(source), source.classes, source.in_chans, source.image_size) == (18, ("no", "yes"), 1, (5, 7))
    assert [r.split for r in source.records][9:15] == ["train", "val", "val", "val", "val", "test"]
    assert source.read(17)[0, 0, 0] == 3


def test_hugging_face_problems(monkeypatch):
    def fails(*args, **kwargs):
        raise ConnectionError("offline")

    fake_hub(monkeypatch, fails)
    with pytest.raises(BadInput, match=r"hf:x/y could not be had \(offline\)"):
        open_source("hf:x/y")
    rows = Rows(3)
    rows.features = {"text": object()}
    fake_hub(monkeypatch, lambda *a, **k: {"train": rows})
    with pytest.raises(BadInput, match=r"needs an image column and a class-label column; it has text \(object\)"):
        open_source("hf:x/y")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r'pip install "vitkit\[hf\]"'):
        open_source("hf:x/y")
