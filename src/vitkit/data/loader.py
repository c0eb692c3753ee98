"""Batches: gathered from memory when the decoded images fit in the budget, decoded by workers when they do not."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vitkit.data.augment import change_values, crop_boxes, draws, move_pixels, resolve
from vitkit.data.decode import Fit, Unreadable, draft_size, fit_box, quiet, resample, to_channels, to_unit
from vitkit.data.source import Source
from vitkit.errors import BadInput, VitkitError

Batch = dict[str, Any]

# crops are cut from a copy this much larger than the model's input, so that they need not be enlarged much
_CROP_MARGIN = 1.25
# augmentations that compute with pixel values
_CHANGES = {"color", "randaugment", "erase"}


class Preparer:
    """Pixels of records at one size, as a model sees them without augmentation.

    Args:
        source: the data.
        image_size: (H, W).
        in_chans: channels.
        fit: "crop" keeps the aspect and takes the largest centred region, "squash" takes all.
    """

    def __init__(self, source: Source, image_size: tuple[int, int], in_chans: int, fit: Fit) -> None:
        self.source, self.size, self.in_chans, self.fit = source, image_size, in_chans, fit
        # more than 8 bits would not survive uint8
        self.wide, self.unit_range = source.wide, source.unit_range

    @property
    def bytes_per_image(self) -> int:
        return self.size[0] * self.size[1] * self.in_chans * (4 if self.wide else 1)

    @property
    def dtype(self) -> type:
        return np.float32 if self.wide else np.uint8

    def none(self) -> np.ndarray:
        """(0, C, H, W) float32: a batch without images."""
        return np.empty((0, self.in_chans, *self.size), np.float32)

    def one(self, index: int, box: np.ndarray | None = None, size: tuple[int, int] | None = None) -> np.ndarray:
        """(H, W, C) of a record: uint8, or float32 in [0, 1] if the source is wide.

        Args:
            index: record number.
            box: left, top, width, height of a region, as shares of what evaluation sees.
            size: (H, W) of the result; None: that of the preparer.
        """
        size = size or self.size
        array = self.source.load(index, at_least=draft_size(size))
        try:
            array = to_channels(array, self.in_chans)
        except Unreadable as error:
            raise BadInput(
                f"{self.source.records[index].key} of {self.source.name} cannot be used: {error}."
            ) from error
        if self.wide:
            array = to_unit(array, self.unit_range)
        left, top, right, bottom = fit_box(array.shape[0], array.shape[1], size, self.fit)
        if box is not None:
            w, h = right - left, bottom - top
            left, top = left + box[0] * w, top + box[1] * h
            # rounding must not push a region over the edge of the image
            right, bottom = min(left + box[2] * w, array.shape[1]), min(top + box[3] * h, array.shape[0])
        return resample(array, (float(left), float(top), float(right), float(bottom)), size)


class Memory:
    """Decoded images of a source at one size; those asked for are decoded once, in threads."""

    def __init__(self, prepare: Preparer, count: int) -> None:
        self.prepare = prepare
        # pages of an empty array cost nothing until they are written
        self.images: np.ndarray = np.empty((count, *prepare.size, prepare.in_chans), prepare.dtype)
        self.filled = np.zeros(count, bool)

    def fill(self, indices: np.ndarray) -> None:
        missing = indices[~self.filled[indices]]
        if len(missing) == 0:
            return

        def put(index: int) -> None:
            self.images[index] = self.prepare.one(index)

        if self.prepare.source.pixels.decodes:
            with quiet(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                for _ in pool.map(put, missing.tolist()):
                    pass
        else:
            for index in missing.tolist():
                put(index)
        self.filled[missing] = True


def memory_of(source: Source, prepare: Preparer) -> Memory:
    """The memory of a source at this size, shared by all its loaders; the two used last are kept."""
    key = (prepare.size, prepare.in_chans, prepare.fit, len(source))
    kept: dict[Any, Memory] = source.__dict__.setdefault("_memories", {})
    found = kept.pop(key, None) or Memory(prepare, len(source))
    kept[key] = found
    while len(kept) > 2:
        kept.pop(next(iter(kept)))
    return found


class Loader:
    """Iterates over batches; made by :func:`make_loader`.

    A batch is ``{"images": float32 (B, C, H, W) in [0, 1], "labels", "indices": int64 (B,), "weights": float32 (B,)}``;
    labels are int64 (B,) for classes, float32 (B, K) for label sets, float32 (B,) or (B, D) for numbers.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        prepare: Preparer,
        *,
        batch_size: int,
        train: bool,
        names: tuple[str, ...],
        seed: int,
        workers: int | str,
        cache_mb: float,
        drop_last: bool,
    ) -> None:
        self.source, self.indices, self.prepare = source, indices, prepare
        self.batch_size, self.train, self.names, self.seed = batch_size, train, names, seed
        self.workers, self.drop_last, self.cache_mb = workers, drop_last, cache_mb
        self.rank, self.world, self.before = 0, 1, 0
        self.labels = torch.from_numpy(source.labels(indices)) if len(indices) else torch.empty(0)
        self.weights = torch.tensor([source.records[int(i)].weight for i in indices], dtype=torch.float32)
        self._epoch, self._start = 0, 0
        self._stored = self._store(cache_mb)
        self._workers: DataLoader[Any] | None = None
        self._plan = _Plan()

    def _store(self, cache_mb: float) -> Preparer | None:
        """At which size to keep the images in memory, None if they do not fit.

        Decided by the size of the source alone: a resumed run must not find another answer than the first one.
        """
        p, budget = self.prepare, cache_mb * 2**20
        if len(self.source) * p.bytes_per_image > budget:
            return None
        if "crop" not in self.names:
            return p
        h, w = (round(side * _CROP_MARGIN) for side in p.size)
        larger = Preparer(self.source, (h, w), p.in_chans, p.fit)
        grown = min(self.source.image_size[0] / p.size[0], self.source.image_size[1] / p.size[1])
        # evaluation keeps its own copy of the other images, so both must fit
        fits = len(self.source) * (larger.bytes_per_image + p.bytes_per_image) <= budget
        return larger if grown >= _CROP_MARGIN and fits else p

    @property
    def in_memory(self) -> bool:
        """True if decoded images are kept."""
        return self._stored is not None

    def __len__(self) -> int:
        return len(self.indices) // self.batch_size if self.drop_last else -(-len(self.indices) // self.batch_size)

    def subset(self, rows: np.ndarray, train: bool | None = None) -> Loader:
        """A loader of some of the images.

        Args:
            rows: which of ``indices``.
            train: False gives them in their order and without augmentation; None leaves that as it is here.
        """
        train = self.train if train is None else train
        return Loader(
            self.source,
            self.indices[rows],
            self.prepare,
            batch_size=self.batch_size,
            train=train,
            names=self.names if train else (),
            seed=self.seed,
            workers=self.workers,
            cache_mb=self.cache_mb,
            drop_last=self.drop_last and train,
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose order and augmentation of the next pass."""
        self._epoch, self._start = int(epoch), 0

    def start_at(self, step: int) -> None:
        """Begin the next pass at this batch, as if the ones before had been taken."""
        if not 0 <= step <= len(self):
            raise BadInput(f"start_at({step}): a pass has {len(self)} batches.")
        self._start = int(step)

    def shard(self, rank: int, world: int, before: int = 0) -> None:
        """Take this process's share of each batch from now on: consecutive images, sizes that differ by at most one.

        Together the processes get the batches that one would get. A share may be empty: (0, C, H, W).

        Args:
            rank, world: which process, of how many; (0, 1) takes whole batches again.
            before: images ahead of the share (of the batch's end, ahead of its first image) that come with it, for who
                blends neighbours; an empty share gets none.

        Raises: BadInput if the rank is not in 0…world − 1.
        """
        if not 0 <= rank < world:
            raise BadInput(f"shard({rank}, {world}): the rank lies in 0…{world - 1}.")
        self.rank, self.world, self.before = rank, world, before
        # they know the shares of before
        self._workers = None

    def keys(self, indices: Sequence[int] | np.ndarray | Tensor) -> list[str]:
        """File names of record numbers."""
        return [self.source.records[int(i)].key for i in indices]

    def positions(self, epoch: int, step: int) -> np.ndarray:
        """Which of ``indices`` are in a batch."""
        chosen = self._order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        start, stop = (len(chosen) * rank // self.world for rank in (self.rank, self.rank + 1))
        if start == stop:
            return chosen[:0]
        return chosen[np.arange(start - self.before, stop) % len(chosen)]

    def _order(self, epoch: int) -> np.ndarray:
        if not self.train:
            return np.arange(len(self.indices))
        kept = getattr(self, "_ordered", None)
        if kept is None or kept[0] != epoch:
            kept = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.indices)))
            self._ordered = kept
        return kept[1]

    def __iter__(self) -> Iterator[Batch]:
        epoch, start, end = self._epoch, self._start, len(self)
        self._start = 0
        if start >= end:
            return
        if self._stored is not None:
            yield from self._from_memory(epoch, range(start, end))
        elif _num_workers(self.workers) == 0:
            work = _Work(self)
            for step in range(start, end):
                yield self._finish(epoch, step, work[epoch, step])
        else:
            yield from self._from_workers(epoch, start, end)

    def _from_memory(self, epoch: int, steps: range) -> Iterator[Batch]:
        assert self._stored is not None
        memory = memory_of(self.source, self._stored)
        own = self.indices
        if self.world > 1:
            # the others decode the rest
            own = np.unique(own[np.concatenate([self.positions(epoch, step) for step in steps])])
        memory.fill(own)
        for step in steps:
            at = self.positions(epoch, step)
            numbers = self.indices[at]
            if not len(numbers):
                yield self._finish(epoch, step, self.prepare.none())
                continue
            images = memory.images[numbers]
            if self.names:
                u = draws(self.seed, epoch, numbers)
                if "crop" in self.names:
                    images = _cut(images, crop_boxes(u), self.prepare.size)
                images = move_pixels(images, u, self.names)
                if _CHANGES & set(self.names):
                    images = change_values(torch.from_numpy(_unit(images)), u, self.names).numpy()
                    yield self._finish(epoch, step, images)
                    continue
            yield self._finish(epoch, step, _unit(images))

    def _from_workers(self, epoch: int, start: int, end: int) -> Iterator[Batch]:
        if self._workers is None:
            self._workers = self._start_workers()
        self._plan.steps = [(epoch, step) for step in range(start, end)]
        try:
            for step, images in zip(range(start, end), self._workers):
                yield self._finish(epoch, step, images)
        except VitkitError:
            # kept alive by the traceback, the workers would be torn down in an order that makes torch wait for seconds
            self._workers = None
            raise

    def _start_workers(self) -> DataLoader[Any]:
        prefetch, workers = 2, _num_workers(self.workers)
        work = _Work(self)
        # tensors travel through shared memory, of which containers often have next to none; a pipe always works
        need = self.batch_size * self.prepare.bytes_per_image * workers * (prefetch + 1)
        work.through_pipe = need > _free_shared_memory() / 2
        return DataLoader(
            work,
            sampler=self._plan,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch,
            persistent_workers=True,
            # without one of its own it would draw from the global generator, and a resumed run would differ
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _finish(self, epoch: int, step: int, images: Any) -> Batch:
        if isinstance(images, str):
            raise BadInput(images)
        at = self.positions(epoch, step)
        numbers = self.indices[at]
        images = images if isinstance(images, np.ndarray) else images.numpy()
        if images.dtype == np.uint8:
            images = _unit(images.transpose(0, 2, 3, 1))
        where = torch.from_numpy(at)
        return {
            "images": torch.from_numpy(images),
            "labels": self.labels[where],
            "indices": torch.from_numpy(numbers),
            "weights": self.weights[where],
        }


class _Plan(Sampler[tuple[int, int]]):
    """The (epoch, step) pairs of the next pass; workers that live on are told by it what comes."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


class _Work(Dataset[Any]):
    """What a worker process does: (epoch, step) → images (B, C, H, W) of that batch, cut, resized and moved."""

    def __init__(self, loader: Loader) -> None:
        # not the loader itself: it holds the workers, which cannot be sent to a worker
        self.plan = _positions_only(loader)
        self.indices, self.prepare = loader.indices, loader.prepare
        self.names, self.seed = loader.names, loader.seed
        self.through_pipe = False

    def __getitem__(self, at: tuple[int, int]) -> Any:
        epoch, step = at
        numbers = self.indices[self.plan.positions(epoch, step)]
        if not len(numbers):
            return self.prepare.none()
        u = draws(self.seed, epoch, numbers)
        boxes = crop_boxes(u) if "crop" in self.names else [None] * len(numbers)
        try:
            with quiet():
                pictures = [self.prepare.one(int(i), box) for i, box in zip(numbers, boxes)]
        except VitkitError as error:
            # raised again by the main process, without the worker's traceback around it
            return str(error)
        images = move_pixels(np.stack(pictures), u, self.names)
        if _CHANGES & set(self.names):
            changed = change_values(torch.from_numpy(_unit(images)), u, self.names).numpy()
            # a quarter of the bytes to hand over
            images = changed if self.prepare.wide else np.rint(changed * 255).astype(np.uint8)
        else:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return images if self.through_pipe else torch.from_numpy(images)


def _unit(images: np.ndarray) -> np.ndarray:
    """(B, H, W, C) uint8, or floats in [0, 1] → contiguous float32 (B, C, H, W) in [0, 1].

    In numpy: for a few megabytes, waking torch's threads costs more than it saves, above all on a busy machine.
    """
    planes = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8:
        return np.ascontiguousarray(planes, np.float32)
    return np.divide(planes, np.float32(255), out=np.empty(planes.shape, np.float32), dtype=np.float32)


def _cut(images: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Regions (shares of the whole) of a batch (B, H, W, C), brought to ``size``."""
    h, w = images.shape[1:3]
    edges = np.stack([boxes[:, 0], boxes[:, 1], boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]], 1)
    edges = np.minimum(edges, 1) * (w, h, w, h)
    return np.stack([resample(image, tuple(box), size) for image, box in zip(images, edges.tolist())])


def _positions_only(loader: Loader) -> Loader:
    """A copy that knows the order of things and nothing else."""
    bare = object.__new__(Loader)
    for name in ("indices", "batch_size", "train", "seed", "drop_last", "rank", "world", "before"):
        setattr(bare, name, getattr(loader, name))
    return bare


def _free_shared_memory() -> float:
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else float("inf")


def make_loader(
    source: Source,
    indices: np.ndarray,
    image_size: tuple[int, int],
    in_chans: int,
    batch_size: int = 64,
    train: bool = False,
    augment: str | Sequence[str] = "none",
    seed: int = 0,
    workers: int | str = "auto",
    cache_mb: float = 512,
    drop_last: bool = False,
    fit: Fit = "crop",
) -> Loader:
    """Batches of some records of a source, at one size.

    If all images of the source at this size fit in ``cache_mb``, they are decoded once and kept; else they are decoded
    anew in worker processes, a few batches ahead. Either way the same (seed, epoch, image) gives the same pixels.

    >>> from vitkit.data import open_source
    >>> source = open_source("digits")
    >>> batch = next(iter(make_loader(source, [0, 5, 9], image_size=(8, 8), in_chans=1, batch_size=2)))
    >>> batch["images"].shape, batch["labels"].tolist(), batch["indices"].tolist()
    (torch.Size([2, 1, 8, 8]), [0, 5], [0, 5])

    Args:
        source: the data.
        indices: record numbers.
        image_size: (H, W) of the batches.
        in_chans: channels of the batches; grey is repeated, colour becomes luminance.
        batch_size: images a batch.
        train: shuffle anew every epoch.
        augment: "none", "light", "strong", or names out of :data:`vitkit.data.AUGMENTATIONS`. Applied whether or not
            ``train`` is set.
        seed: of order and augmentation.
        workers: processes that decode; "auto": one for each core but one, at least one and at most eight, the cores
            divided among the training processes of this machine; 0: none.
        cache_mb: budget of decoded images, in MiB; 0: keep none.
        drop_last: leave out the last batch if it is smaller than the others.
        fit: how an image of another aspect is brought to ``image_size``: "crop" or "squash".

    Raises: BadInput for indices outside the source and sizes that are not positive; UnknownName.
    """
    numbers = np.asarray(indices, dtype=np.int64).reshape(-1)
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(source)):
        raise BadInput(f"Indices must lie in 0…{len(source) - 1}; got {numbers.min()}…{numbers.max()}.")
    if batch_size < 1 or min(image_size) < 1 or in_chans < 1:
        raise BadInput(f"batch_size={batch_size}, image_size={image_size} and in_chans={in_chans} must be positive.")
    if fit not in ("crop", "squash"):
        raise BadInput(f"fit={fit!r} is unknown; it is 'crop' or 'squash'.")
    _num_workers(workers)
    size = (int(image_size[0]), int(image_size[1]))
    return Loader(
        source,
        numbers,
        Preparer(source, size, in_chans, fit),
        batch_size=batch_size,
        train=train,
        names=resolve(augment, size, source.mirror),
        seed=seed,
        workers=workers,
        cache_mb=cache_mb,
        drop_last=drop_last,
    )


def _num_workers(workers: int | str) -> int:
    if multiprocessing.current_process().daemon:
        # such a process may not have children
        return 0
    if workers == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # torchrun's word for the number of training processes here
        return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
    if isinstance(workers, str) or workers < 0:
        raise BadInput(f"workers={workers!r} must be 'auto' or a number of at least 0.")
    return workers


def mean_std(
    source: Source,
    indices: np.ndarray,
    image_size: tuple[int, int],
    limit: int = 512,
    in_chans: int | None = None,
    fit: Fit = "crop",
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, in units of [0, 1].

    Args:
        source: the data.
        indices: the training part; nothing else may be looked at.
        image_size: (H, W).
        limit: at most this many images, drawn with a fixed seed.
        in_chans: None: those of the source.
        fit: as in :func:`make_loader`.

    Returns: (C,) and (C,), float32. Raises: BadInput if there are no images.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    if len(chosen) == 0:
        raise BadInput(f"There are no images of {source.name} to take the mean of.")
    if len(chosen) > limit:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, limit, replace=False))
    loader = make_loader(source, chosen, image_size, in_chans or source.in_chans, 64, workers=0, cache_mb=0, fit=fit)
    count, total, square = 0, 0.0, 0.0
    for batch in loader:
        images = batch["images"].double()
        count += images.numel() // images.shape[1]
        total = total + images.sum((0, 2, 3)).numpy()
        square = square + images.square().sum((0, 2, 3)).numpy()
    mean = np.asarray(total / count)
    std = np.sqrt(np.maximum(square / count - mean**2, 0))
    return mean.astype(np.float32), std.astype(np.float32)
