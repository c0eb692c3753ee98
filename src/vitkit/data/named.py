"""Data sets with a name: scikit-learn's digits, and those of torchvision and Hugging Face when online."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitkit.data.arrays import ArrayListing, list_arrays
from vitkit.data.decode import Reading, Unreadable, to_array
from vitkit.data.look import digest
from vitkit.data.source import Record, Split
from vitkit.errors import BadInput, MissingExtra, unknown

#: data sets whose images mean something else in the mirror
NOT_MIRRORED = ("mnist", "digits", "svhn", "usps", "omniglot", "gtsrb", "textvqa", "renderedsst2")

_SPLITS: tuple[tuple[str, Split], ...] = (("train", "train"), ("val", "val"), ("validation", "val"), ("test", "test"))


def cache_folder() -> Path:
    """Where downloads go: ``$VITKIT_CACHE``, else ``~/.cache/vitkit``."""
    return Path(os.environ.get("VITKIT_CACHE", Path.home() / ".cache" / "vitkit")) / "datasets"


def list_digits() -> ArrayListing:
    """Scikit-learn's 1,797 handwritten digits, 8×8 pixels with 17 grey levels, spread over 0…255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return list_arrays([(None, "digits", images, data.target.astype(np.int64))], "digits", tuple("0123456789"))


class DatasetPixels:
    """Pixels of data sets that hand out Pillow images by position.

    Args:
        parts: (number of images, position → image) of each split, one after the other.
        how: see :class:`Reading`.
    """

    decodes = True

    def __init__(self, parts: Sequence[tuple[int, Callable[[int], Any]]], how: Reading) -> None:
        self.parts, self.how = list(parts), how
        self.starts = np.cumsum([0, *(n for n, _ in self.parts)])

    def load(self, where: int, at_least: tuple[int, int] | None = None) -> tuple[np.ndarray, tuple[int, int]]:
        part = int(np.searchsorted(self.starts, where, side="right")) - 1
        try:
            image = self.parts[part][1](where - int(self.starts[part]))
            array = to_array(image, self.how.alpha) if hasattr(image, "mode") else np.asarray(image)
        except OSError:
            raise
        except Exception as error:
            # third-party data sets fail in their own ways; to us the image is just not there
            raise Unreadable(f"the data set does not hand it out ({type(error).__name__}: {error})") from error
        array = array[..., None] if array.ndim == 2 else array
        return array, array.shape[:2]

    def look(self, where: int) -> tuple[np.ndarray, tuple[int, int], bytes]:
        array, size = self.load(where)
        return array, size, digest(np.ascontiguousarray(array).tobytes())


class _First:
    """Position → first element of an item (torchvision), picklable for worker processes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, i: int) -> Any:
        return self.dataset[i][0]


class _Column:
    """Position → one column of an item (Hugging Face), picklable for worker processes."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __call__(self, i: int) -> Any:
        return self.dataset[i][self.column]


def list_torchvision(name: str, how: Reading) -> tuple[DatasetPixels, list[Record], tuple[str, ...]]:
    """A classification data set of torchvision, downloaded at the first use.

    Raises: UnknownName; BadInput when it cannot be had (offline) or has no single class per image.
    """
    from torchvision import datasets

    known = {n: getattr(datasets, n) for n in datasets.__all__ if n not in ("FakeData", "ImageFolder", "DatasetFolder")}
    kind = known.get(name) or next((v for n, v in known.items() if n.lower() == name.lower()), None)
    if kind is None:
        raise unknown(
            "torchvision data set", name, known, "python -c 'import torchvision.datasets as d; print(d.__all__)'"
        )
    parameters = inspect.signature(kind.__init__).parameters
    parts: list[tuple[int, Callable[[int], Any]]] = []
    records: list[Record] = []
    classes: tuple[str, ...] | None = None
    if "train" in parameters:
        wanted: list[tuple[dict[str, Any], Split]] = [({"train": True}, "train"), ({"train": False}, "test")]
    elif "split" in parameters:
        wanted = [({"split": s}, split) for s, split in _SPLITS]
    else:
        wanted = [({}, "train")]
    for arguments, split in wanted:
        try:
            data = kind(root=str(cache_folder() / "torchvision"), download=True, **arguments)
        except ValueError:
            # this data set has no such split; each has its own set of names
            continue
        except (OSError, RuntimeError, TypeError) as error:
            raise _not_had(f"torchvision:{name}", error) from error
        labels = _torchvision_labels(data, name)
        classes = classes or tuple(str(c) for c in getattr(data, "classes", ()))
        parts.append((len(data), _First(data)))
        records += [Record(f"{name}/{split}[{i}]", label, None, split) for i, label in enumerate(labels)]
    return _finish(f"torchvision:{name}", parts, records, classes, how, len(wanted) > 1)


def _torchvision_labels(data: Any, name: str) -> list[int]:
    for attribute in ("targets", "labels", "_labels", "y"):
        values = getattr(data, attribute, None)
        if values is not None and len(values) == len(data):
            return [int(v) for v in values]
    try:
        return [int(data[i][1]) for i in range(len(data))]
    except (TypeError, ValueError) as error:
        raise BadInput(f"torchvision:{name} does not have one class per image, so it cannot be classified.") from error


def list_hf(name: str, how: Reading) -> tuple[DatasetPixels, list[Record], tuple[str, ...]]:
    """An image classification data set of the Hugging Face hub: the image column and the class-label column.

    ``name`` is ``owner/name`` or ``owner/name:configuration``.

    Raises: MissingExtra; BadInput when it cannot be had (offline) or has no image or class column.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("A Hugging Face data set", "datasets", "hf") from error
    repository, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, configuration or None, cache_dir=str(cache_folder() / "hf"))
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise _not_had(f"hf:{name}", error) from error
    parts: list[tuple[int, Callable[[int], Any]]] = []
    records: list[Record] = []
    classes: tuple[str, ...] | None = None
    order = dict(_SPLITS)
    for key, data in loaded.items():
        split = order.get(str(key))
        if split is None:
            continue
        images = [c for c, f in data.features.items() if type(f).__name__ == "Image"]
        labels = [c for c, f in data.features.items() if type(f).__name__ == "ClassLabel"]
        if not images or not labels:
            raise BadInput(
                f"hf:{name} needs an image column and a class-label column; it has "
                f"{', '.join(f'{c} ({type(f).__name__})' for c, f in data.features.items())}."
            )
        classes = classes or tuple(data.features[labels[0]].names)
        parts.append((len(data), _Column(data, images[0])))
        records += [Record(f"{key}[{i}]", int(v), None, split) for i, v in enumerate(data[labels[0]])]
    return _finish(f"hf:{name}", parts, records, classes, how, len(loaded) > 1)


def _finish(
    name: str,
    parts: list[tuple[int, Callable[[int], Any]]],
    records: list[Record],
    classes: tuple[str, ...] | None,
    how: Reading,
    several: bool,
) -> tuple[DatasetPixels, list[Record], tuple[str, ...]]:
    bad = [r.key for r in records if int(r.label) < 0]  # type: ignore[arg-type]
    if bad:
        raise BadInput(f"{name} hides the labels of {len(bad)} images (label −1), such as {bad[0]}.")
    if not records:
        raise BadInput(f"{name} has neither a train nor a test split.")
    if not classes or len(classes) <= max(int(r.label) for r in records):  # type: ignore[arg-type]
        classes = tuple(str(i) for i in range(1 + max(int(r.label) for r in records)))  # type: ignore[arg-type]
    if not several or len({r.split for r in records}) == 1:
        records = [Record(r.key, r.label) for r in records]
    return DatasetPixels(parts, how), records, classes


def _not_had(name: str, error: Exception) -> BadInput:
    said = str(error).strip().splitlines()
    return BadInput(
        f"{name} could not be had ({said[0] if said else type(error).__name__}). It is downloaded at the first use, "
        "which needs a network connection; offline, give a folder, table or .npz instead. Downloads are kept in "
        f"{cache_folder()}."
    )


def mirror_safe(name: str) -> bool:
    """False for data sets of digits and letters, by their name."""
    return not any(word in name.lower() for word in NOT_MIRRORED)
