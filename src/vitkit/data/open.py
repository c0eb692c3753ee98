"""Whatever the user points at, as a :class:`Source`."""

from __future__ import annotations

import difflib
import os
import posixpath
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitkit.data.arrays import ArrayListing, ArrayPixels, find_idx, list_idx, list_npz
from vitkit.data.decode import Alpha, Reading
from vitkit.data.files import FilePixels
from vitkit.data.folder import Listing, list_folder
from vitkit.data.labels import Unknown, as_regression, check_unknown
from vitkit.data.look import Progress, hash_lines, look, recall, remember
from vitkit.data.named import DatasetPixels, list_digits, list_hf, list_torchvision, mirror_safe
from vitkit.data.source import Record, Skipped, Source, Task, check_labels
from vitkit.data.table import TABLE_ENDINGS, Columns, list_table, read_table, usable
from vitkit.data.tree import FolderTree, Tree, ZipTree
from vitkit.errors import BadInput

TASKS = ("classify", "multilabel", "regress")


def open_source(
    target: str | os.PathLike[str],
    task: Task | None = None,
    *,
    path_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    group_column: str | None = None,
    split_column: str | None = None,
    weight_column: str | None = None,
    alpha: Alpha = "white",
    max_pixels: int = Reading().max_pixels,
    value_range: tuple[float, float] | None = None,
    unknown: Unknown | None = None,
    memory: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Source:
    """Open labelled images. Files are listed, each is decoded once, and those that cannot be are skipped and counted.

    >>> source = open_source("digits")
    >>> len(source), source.task, source.image_size, source.in_chans, source.num_outputs
    (1797, 'classify', (8, 8), 1, 10)

    Args:
        target: ``"digits"``; a folder or zip of class folders (perhaps below train/val/test), or with a table or IDX
            files in it; a CSV, TSV or Parquet table; an ``.npz``; ``"torchvision:CIFAR10"``; ``"hf:owner/name"``.
        task: "classify", "multilabel" or "regress"; None: told by the labels.
        path_column, label_column, group_column, split_column, weight_column: of a table; None: the usual names.
        alpha: what transparency becomes; see :class:`vitkit.data.decode.Reading`.
        max_pixels: larger images are skipped.
        value_range: black and white of float images; None: read off them.
        unknown: of images whose label in a table or array is empty or −1. "skip": left out, and listed as skipped;
            "absent", "present": −1 is 0 or 1 where labels are 0 and 1, and an empty cell 0; "class": −1 is a class.
            None: a −1 beside two or more class numbers from 0 is left out, anything else is an error.
        memory: a file to keep the result of the check of all images in, so that the next process does not repeat it.
        progress: called as ``progress("check images", done, total)``.

    Raises: BadInput for anything that cannot be used, naming file, key or row and what to do; MissingExtra;
        UnknownName.
    """
    if task is not None and task not in TASKS:
        raise BadInput(f"task={task!r} is unknown; it is one of {', '.join(TASKS)}.")
    check_unknown(unknown)
    name, how = str(target), Reading(alpha, max_pixels)
    columns = Columns(path_column, label_column, group_column, split_column, weight_column)
    if name == "digits":
        return _from_arrays(list_digits(), name, task, value_range, mirror=False)
    prefix, _, rest = name.partition(":")
    if prefix == "torchvision":
        return _from_dataset(*list_torchvision(rest, how), name, task, progress)
    if prefix == "hf":
        return _from_dataset(*list_hf(rest, how), name, task, progress)
    path = Path(name).expanduser()
    _exists(path, name)
    if path.is_dir():
        return _from_tree(FolderTree(path), name, task, how, columns, value_range, unknown, memory, progress)
    if path.suffix.lower() == ".npz":
        return _from_arrays(list_npz(path, task, unknown), name, task, value_range, mirror_safe(path.stem))
    if path.suffix.lower() in TABLE_ENDINGS:
        tree = FolderTree(path.parent, walkable=False)
        return _from_table(tree, path.name, name, task, how, columns, value_range, unknown, memory, progress)
    if path.suffix.lower() == ".zip":
        return _from_tree(ZipTree(path), name, task, how, columns, value_range, unknown, memory, progress)
    raise BadInput(
        f"{name} is a file of a kind that holds no labelled images. Give a folder of class folders, a .zip of one, a "
        ".csv, .tsv or .parquet table of paths and labels, or an .npz."
    )


def _exists(path: Path, name: str) -> None:
    try:
        path.stat()
    except PermissionError as error:
        raise BadInput(
            f"{name} cannot be read: {error.strerror}. Give yourself the right to it (chmod, chown)."
        ) from error
    except OSError as error:
        places = ["digits"]
        if path.parent.is_dir() and os.access(path.parent, os.R_OK):
            places += [str(path.parent / p.name) if path.parent != Path() else p.name for p in path.parent.iterdir()]
        near = difflib.get_close_matches(name, places, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BadInput(
            f"There is no file or folder {name!r}.{hint} Images come from a folder, zip, table or .npz, from 'digits', "
            "'torchvision:NAME' or 'hf:NAME'."
        ) from error


def _from_tree(
    tree: Tree,
    name: str,
    task: Task | None,
    how: Reading,
    columns: Columns,
    value_range: tuple[float, float] | None,
    unknown: Unknown | None,
    memory: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Source:
    idx = find_idx(tree)
    if idx:
        # the folder is often just called "data", but the files themselves are those of MNIST and its kin
        return _from_arrays(
            list_idx(tree, idx, task, unknown), name, task, value_range, mirror="fashion" in name.lower()
        )
    table = _table_in(tree, columns)
    if table is not None:
        return _from_table(tree, table, name, task, how, columns, value_range, unknown, memory, progress)
    listing = list_folder(tree)
    if task == "multilabel":
        raise BadInput(
            f'{name}: class folders give one class per image; task="multilabel" needs a table with a;b labels.'
        )
    if task == "regress":
        listing.records = _to_regression(listing.records, listing.classes, name)
        listing.classes = ("target",)
    return _from_files(tree, listing, name, task or "classify", how, value_range, memory, progress)


def _table_in(tree: Tree, columns: Columns) -> str | None:
    """The table that labels the images of a tree: the one nearest to the top with a column of paths and of labels.

    Class folders often come with some table; labels that someone wrote down count more than folder names.
    """
    tables = [f for f in tree.files() if posixpath.splitext(f)[1].lower() in TABLE_ENDINGS and f.count("/") <= 1]
    tables = sorted(tables, key=lambda f: (f.count("/"), f))
    if columns.label is not None and len(tables) == 1:
        return tables[0]
    found = [f for f in tables if usable(read_table(tree.read(f), f))]
    top = [f for f in found if f.count("/") == found[0].count("/")]
    if len(top) > 1:
        raise BadInput(
            f"{tree.root} has several tables of images ({', '.join(top)}); give the one you mean as the data."
        )
    return found[0] if found else None


def _from_table(
    tree: Tree,
    table: str,
    name: str,
    task: Task | None,
    how: Reading,
    columns: Columns,
    value_range: tuple[float, float] | None,
    unknown: Unknown | None,
    memory: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Source:
    try:
        data = tree.read(table)
    except OSError as error:
        raise BadInput(f"{posixpath.join(tree.root, table)} cannot be read: {error.strerror or error}.") from error
    listing, task = list_table(read_table(data, table), tree, posixpath.dirname(table), task, columns, unknown)
    return _from_files(tree, listing, name, task, how, value_range, memory, progress)


def _from_files(
    tree: Tree,
    listing: Listing,
    name: str,
    task: Task,
    how: Reading,
    value_range: tuple[float, float] | None,
    memory: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Source:
    stamps = [tree.stamp(p) if tree.exists(p) else (0, "gone") for p in listing.paths]
    lines = [f"{task} {how} {value_range} {listing.classes}"]
    lines += [f"{r!r} {size} {mark}" for r, (size, mark) in zip(listing.records, stamps)]
    fingerprint = hash_lines(lines)
    pixels = FilePixels(tree, listing.paths, how)
    kept = recall(Path(memory), fingerprint) if memory is not None else None
    if kept is None:
        kept = look(len(listing.paths), pixels.look, "check images", progress)
        if memory is not None:
            remember(Path(memory), fingerprint, *kept)
    looks, bad = kept
    where = np.array([i for i in range(len(listing.paths)) if i not in bad], np.int64)
    source = Source(
        name=name,
        task=task,
        classes=listing.classes,
        records=[listing.records[i] for i in where],
        pixels=pixels,
        where=where,
        fingerprint=fingerprint,
        skipped=listing.skipped + [Skipped(listing.records[i].key, r) for i, r in sorted(bad.items())],
        value_range=value_range,
    )
    source._looks = looks
    _drop_odd_channels(source)
    check_labels(source)
    return source


def _drop_odd_channels(source: Source) -> None:
    """Images whose channels have nothing to do with the others' (a 13-band tile among photographs) are skipped."""
    if not source.records:
        return
    looks, chans = source.looks(), source.in_chans
    fits = (looks.chans == chans) | (looks.chans == 1) | ((looks.chans == 3) & (chans == 1))
    if fits.all():
        return
    for i in np.flatnonzero(~fits):
        reason = f"it has {looks.chans[i]} channels where the others have {chans}"
        source.skipped.append(Skipped(source.records[i].key, reason))
    kept = np.flatnonzero(fits)
    source.records = [source.records[i] for i in kept]
    source.where = source.where[kept]
    source._looks = looks.take(kept)


def _from_arrays(
    listing: ArrayListing, name: str, task: Task | None, value_range: tuple[float, float] | None, mirror: bool
) -> Source:
    from vitkit.data.look import digest

    records, classes, kind = listing.records, listing.classes, listing.task
    if task == "regress" and kind == "classify":
        records, classes, kind = _to_regression(records, classes, name), ("target",), "regress"
    if task is not None and task != kind:
        raise BadInput(f"{name}: task={task!r} does not suit these labels, which say {kind!r}.")
    lines = [f"{kind} {value_range} {classes}"]
    lines += [f"{b.shape} {b.dtype} {digest(np.ascontiguousarray(b).data.cast('B')).hex()}" for b in listing.blocks]
    lines += [repr(r) for r in records]
    source = Source(
        name=name,
        task=kind,
        classes=classes,
        records=records,
        pixels=ArrayPixels(listing.blocks),
        where=listing.where,
        fingerprint=hash_lines(lines),
        skipped=listing.skipped,
        mirror=mirror,
        value_range=value_range,
    )
    _at_least_two(source)
    check_labels(source)
    return source


def _from_dataset(
    pixels: DatasetPixels,
    records: list[Record],
    classes: tuple[str, ...],
    name: str,
    task: Task | None,
    progress: Progress | None,
) -> Source:
    if task == "multilabel":
        raise BadInput(f'{name} has one class per image; task="multilabel" does not suit it.')
    if task == "regress":
        records, classes = _to_regression(records, classes, name), ("target",)
    looks, bad = look(len(records), pixels.look, "check images", progress)
    where = np.array([i for i in range(len(records)) if i not in bad], np.int64)
    digests = looks.digests.tobytes().hex()
    source = Source(
        name=name,
        task=task or "classify",
        classes=classes,
        records=[records[i] for i in where],
        pixels=pixels,
        where=where,
        fingerprint=hash_lines([digests, *(repr(r) for r in records)]),
        skipped=[Skipped(records[i].key, r) for i, r in sorted(bad.items())],
        mirror=mirror_safe(name),
    )
    source._looks = looks
    _drop_odd_channels(source)
    _at_least_two(source)
    check_labels(source)
    return source


def _at_least_two(source: Source) -> None:
    if source.task == "classify" and len(np.unique(source.labels())) < 2:
        only = source.label_names(0)
        raise BadInput(
            f"{source.name} has only one class ({only!r}), so there is nothing to tell apart. Add images of a second "
            'class, or give numbers as labels and task="regress".'
        )


def _to_regression(records: Sequence[Record], classes: Sequence[str], name: str) -> list[Record]:
    values = as_regression([r.label for r in records], classes, name)
    return [Record(r.key, v, r.group, r.split, r.weight) for r, v in zip(records, values)]
