"""Pairs of gridded fields, coarse and fine, from folders of ``.npz`` files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitkit.errors import BadInput

# n samples of a file · V variables · K targets · h×w coarse and H×W fine cells


class FieldPairs(Dataset[dict[str, Any]]):
    """Coarse fields of some variables, and the fine fields of others, sample by sample.

    Two folders hold files of equal names; a file holds an array per variable, (n, h, w) or (n, 1, h, w), a fixed field
    (orography) (h, w) or (1, h, w). Files are read one at a time, and the last one stays in memory: keep samples of a
    file together, or leave shuffling to files of a few hundred samples.

    Args:
        low, high: folders of the coarse and the fine ``.npz`` files; ``normalize_mean.npz`` and
            ``normalize_std.npz`` among them give a number per variable, others are not needed.
        variables: inputs, in the order of the channels. targets: outputs, likewise.
        mean, std: of coarse variables by name, in place of the files; what neither has is measured over all coarse
            files once. Use those of the training set for the others.

    Items: ``images`` (V, h, w) standardised, missing cells 0, that is the mean; ``labels`` (K, H, W) as they are, NaN
    where nothing was observed.
    Attributes: mean, std: by name, of the inputs; target_mean, target_std: K values of the targets' fine fields, for
        :class:`~vitkit.tasks.downscale.Downscale`; scale: (H/h, W/w).
    Raises: BadInput if files do not pair up, a variable is missing or shapes do not fit; the message names the file.
    """

    def __init__(
        self,
        low: str | PathLike[str],
        high: str | PathLike[str],
        variables: Sequence[str],
        targets: Sequence[str],
        mean: Mapping[str, float] | None = None,
        std: Mapping[str, float] | None = None,
    ) -> None:
        self.low, self.high = Path(low), Path(high)
        self.variables, self.targets = tuple(variables), tuple(targets)
        names = [_shards(folder) for folder in (self.low, self.high)]
        if names[0] != names[1] or not names[0]:
            odd = sorted(set(names[0]) ^ set(names[1]))
            raise BadInput(
                f"{self.low} and {self.high} must hold .npz files of equal names, at least one; "
                + (f"{odd[0]} is in one of them only." if odd else "there are none.")
            )
        self.files = names[0]
        self._kept: tuple[int, np.ndarray, np.ndarray] | None = None
        coarse, fine, counts = _Moments(len(self.variables)), _Moments(len(self.targets)), []
        for i, _ in enumerate(self.files):
            x, y = self._file(i)
            coarse.add(x)
            fine.add(y)
            counts.append(len(x))
        self.starts = np.cumsum([0, *counts])
        self.scale = (y.shape[2] / x.shape[2], y.shape[3] / x.shape[3])
        measured = (dict(zip(self.variables, values)) for values in coarse.result())
        self.mean, self.std = (
            {name: float((given or {}).get(name, stored.get(name, seen[name]))) for name in self.variables}
            for given, stored, seen in zip((mean, std), _stored(self.low), measured)
        )
        self.target_mean, self.target_std = fine.result()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} samples; {index} is none of them.")
        index %= len(self)
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        x, y = self._file(shard)
        at = index - int(self.starts[shard])
        shift, width = (
            np.array([table[name] for name in self.variables], dtype=np.float32)[:, None, None]
            for table in (self.mean, self.std)
        )
        images: Tensor = torch.from_numpy((x[at] - shift) / np.where(width > 0, width, 1))
        return {"images": images.nan_to_num(nan=0.0), "labels": torch.from_numpy(y[at].copy()), "indices": index}

    def _file(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        if self._kept is None or self._kept[0] != shard:
            x = _read(self.low / self.files[shard], self.variables)
            y = _read(self.high / self.files[shard], self.targets)
            whole = all(big % small == 0 for big, small in zip(y.shape[2:], x.shape[2:]))
            if len(x) != len(y) or not whole:
                raise BadInput(
                    f"{self.files[shard]} holds {len(x)} coarse fields of {x.shape[2]}×{x.shape[3]} and {len(y)} fine "
                    f"ones of {y.shape[2]}×{y.shape[3]}; as many are needed, and whole multiples of the size."
                )
            self._kept = (shard, x, y)
        return self._kept[1], self._kept[2]


class _Moments:
    """Mean and deviation per channel over any number of arrays, NaN left out."""

    def __init__(self, channels: int) -> None:
        self.count, self.total, self.squares = (np.zeros(channels) for _ in range(3))
        self.origin: np.ndarray | None = None

    def add(self, values: np.ndarray) -> None:
        flat = values.astype(np.float64).swapaxes(0, 1).reshape(values.shape[1], -1)
        known = ~np.isnan(flat)
        if self.origin is None:
            # squares of values around zero, as temperatures in kelvin would cancel
            self.origin = np.array([row[ok].mean() if ok.any() else 0.0 for row, ok in zip(flat, known)])
        centred = np.where(known, flat - self.origin[:, None], 0.0)
        self.count += known.sum(1)
        self.total += centred.sum(1)
        self.squares += np.square(centred).sum(1)

    def result(self) -> tuple[list[float], list[float]]:
        count = np.maximum(self.count, 1)
        mean = self.total / count
        deviation = np.sqrt(np.maximum(self.squares / count - mean**2, 0))
        origin = self.origin if self.origin is not None else 0.0
        # a constant field says nothing, whatever it is divided by
        return (mean + origin).tolist(), np.where(deviation > 0, deviation, 1.0).tolist()


def _shards(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder; name the one that holds the .npz files.")
    return sorted(p.name for p in folder.glob("*.npz") if not p.name.startswith("normalize_"))


def _stored(folder: Path) -> list[dict[str, float]]:
    tables = []
    for what in ("mean", "std"):
        path = folder / f"normalize_{what}.npz"
        values = _archive(path) if path.is_file() else {}
        tables.append({name: float(np.asarray(v).reshape(-1)[0]) for name, v in values.items() if np.size(v)})
    return tables


def _archive(path: Path, wanted: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            absent = [name for name in wanted or () if name not in archive]
            if absent:
                raise BadInput(f"{path} has no array {absent[0]!r}; it has {', '.join(archive.files)}.")
            return {name: archive[name] for name in wanted or archive.files}
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} cannot be read as an .npz archive: {error}.") from error


def _read(path: Path, names: Sequence[str]) -> np.ndarray:
    """(n, variables, height, width) float32."""
    arrays = _archive(path, names)
    columns = []
    for name in names:
        array = arrays[name].astype(np.float32)
        if array.ndim == 4 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim == 2:
            array = array[None]
        if array.ndim != 3:
            raise BadInput(f"{name} in {path} has shape {arrays[name].shape}; it must be (n, h, w) or (n, 1, h, w).")
        columns.append(array)
    count = max(len(array) for array in columns)
    for name, array in zip(names, columns):
        if array.shape[1:] != columns[0].shape[1:] or len(array) not in (1, count):
            raise BadInput(
                f"{name} in {path} has shape {arrays[name].shape}, which does not fit {names[0]} of "
                f"{arrays[names[0]].shape}."
            )
    return np.stack([np.broadcast_to(array, (count, *array.shape[1:])) for array in columns], 1)
