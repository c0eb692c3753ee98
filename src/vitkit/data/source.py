"""Any labelled images as one thing: records with keys, labels, groups and splits, and a way to read pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from vitkit.data.decode import Unreadable, value_range_of
from vitkit.data.labels import Label, some
from vitkit.data.look import Looks, Progress, look
from vitkit.errors import BadInput

Task = Literal["classify", "multilabel", "regress"]
Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Record:
    """One image.

    Attributes:
        key: its file name, for people and messages.
        label: class number; 0/1 per class (multilabel); or the number(s) to predict.
        group: what must stay together in a split (a patient), None if nothing must.
        split: where the data's owner put it, None if left to us.
        weight: importance in the loss, at least 0.
    """

    key: str
    label: Label
    group: str | None = None
    split: Split | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Skipped:
    """One image that cannot be used, and why."""

    key: str
    reason: str


class Pixels(Protocol):
    """Where the pixels of a source come from."""

    #: True where reading means decoding (a file), False where it is a copy out of memory
    decodes: bool

    def load(self, where: int, at_least: tuple[int, int] | None = None) -> tuple[np.ndarray, tuple[int, int]]:
        """Pixels (H, W, C) and the full (H, W). Raises: Unreadable, OSError."""
        ...

    def look(self, where: int) -> tuple[np.ndarray, tuple[int, int], bytes]:
        """Pixels, perhaps reduced, the full (H, W), and a digest of the content. Raises: Unreadable, OSError."""
        ...


@dataclass(eq=False)
class Source:
    """Labelled images, however they are stored. Made by :func:`vitkit.data.open_source`.

    Attributes:
        name: what the user called it.
        task: "classify", "multilabel" or "regress".
        classes: names of the outputs, by number, in natural order.
        records: the readable images.
        skipped: the others, with the reason.
        fingerprint: changes when files, labels or array contents change; the same in every run.
        pixels, where: where the pixels are, and the position in there of each record.
        mirror: False if a mirrored image means something else (digits, letters).
        value_range: black and white of images that are neither 8- nor 16-bit; None: read off the images.
    """

    name: str
    task: Task
    classes: tuple[str, ...]
    records: list[Record]
    pixels: Pixels
    where: np.ndarray
    fingerprint: str
    skipped: list[Skipped] = field(default_factory=list)
    mirror: bool = True
    value_range: tuple[float, float] | None = None
    _looks: Looks | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict[str, object]:
        # worker processes that are started afresh need no copy of the decoded images
        return {name: value for name, value in vars(self).items() if name != "_memories"}

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    def read(self, i: int) -> np.ndarray:
        """Pixels (H, W, C) of record ``i`` as stored: upright, without palette or alpha, in the file's own type.

        Raises: BadInput, naming the file.
        """
        return self.load(i)

    def load(self, i: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
        """As :meth:`read`; a JPEG may come smaller, but not below ``at_least`` (H, W)."""
        try:
            return self.pixels.load(int(self.where[i]), at_least)[0]
        except Unreadable as error:
            raise BadInput(f"{self.records[i].key} of {self.name} cannot be used: {error}.") from error
        except OSError as error:
            raise BadInput(
                f"{self.records[i].key} of {self.name} cannot be opened any more: {error.strerror or error}. "
                "Put the file back, or start again so that it is skipped."
            ) from error

    def looks(self, progress: Progress | None = None) -> Looks:
        """What one look at every image showed; taken at the first call, then kept."""
        if self._looks is None:
            where = self.where
            seen, bad = look(len(self), lambda i: self.pixels.look(int(where[i])), "check images", progress)
            if bad:
                i, reason = next(iter(bad.items()))
                raise BadInput(f"{self.records[i].key} of {self.name} cannot be used: {reason}.")
            self._looks = seen
        return self._looks

    @property
    def in_chans(self) -> int:
        """Channels a model of these images takes: the most common number; 3 if grey and colour are mixed."""
        counts = np.bincount(self._sample_looks().chans)
        present = np.flatnonzero(counts)
        if set(present.tolist()) <= {1, 3}:
            return int(present.max())
        return int(counts.argmax())

    @property
    def image_size(self) -> tuple[int, int]:
        """Median (H, W)."""
        h, w = np.median(self._sample_looks().sizes, axis=0)
        return max(1, round(float(h))), max(1, round(float(w)))

    @property
    def wide(self) -> bool:
        """True if some images have more than 8 bits, so that pixels are kept as floats."""
        return bool((self._sample_looks().kinds > 0).any())

    @property
    def has_floats(self) -> bool:
        """True if some images are neither 8- nor 16-bit, so that black and white are a matter of agreement."""
        return bool((self._sample_looks().kinds == 2).any())

    @property
    def unit_range(self) -> tuple[float, float]:
        """What becomes 0 and 1 in images that are neither 8- nor 16-bit."""
        if self.value_range is not None:
            return self.value_range
        looks = self._sample_looks()
        if not self.has_floats:
            return 0.0, 1.0
        other = looks.kinds == 2
        return value_range_of(np.dtype(np.float32), float(looks.low[other].min()), float(looks.high[other].max()))

    def _sample_looks(self) -> Looks:
        # files were all looked at when the source was opened; arrays of one block are alike, and cheap to look at
        return self.looks()

    def labels(self, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Labels (N,) int64 for classes, (N, K) float32 of 0/1 for multilabel, (N,) or (N, D) float32 else."""
        rows = range(len(self)) if indices is None else indices
        kind = np.int64 if self.task == "classify" else np.float32
        return np.array([self.records[int(i)].label for i in rows], dtype=kind)

    def label_names(self, i: int) -> str:
        """The label of record ``i`` in words."""
        label = self.records[i].label
        if self.task == "classify":
            return self.classes[int(label)]  # type: ignore[arg-type]
        if self.task == "multilabel":
            return ";".join(c for c, on in zip(self.classes, label) if on)  # type: ignore[arg-type]
        values = label if isinstance(label, tuple) else (label,)
        return ", ".join(f"{v:g}" for v in values)


def check_labels(source: Source) -> None:
    """The last word on a source's labels, wherever they came from.

    Raises: BadInput for no images at all, labels that are not finite, class numbers without a class, classes without
        an image, negative weights.
    """
    if not source.records:
        reasons = some([f"{s.key}: {s.reason}" for s in source.skipped], 3)
        raise BadInput(f"{source.name} holds no image that can be used{': ' + reasons if reasons else ''}.")
    bad = [r.key for r in source.records if not (math.isfinite(r.weight) and r.weight >= 0)]
    if bad:
        raise BadInput(f"{source.name}: weights must be numbers of at least 0; they are not for {some(bad)}.")
    labels = source.labels()
    if source.task != "classify":
        wrong = ~np.isfinite(labels).reshape(len(labels), -1).all(1)
        if wrong.any():
            keys = [source.records[i].key for i in np.flatnonzero(wrong)]
            raise BadInput(f"{source.name}: labels must be finite numbers; they are not for {some(keys)}.")
    if source.task == "classify":
        empty = [c for c, n in zip(source.classes, np.bincount(labels, minlength=len(source.classes))) if n == 0]
        if empty:
            raise BadInput(
                f"{source.name} has no usable image of {'class' if len(empty) == 1 else 'classes'} "
                f"{some([repr(c) for c in empty])}. Add images, or remove the class."
            )
