"""Class folders: ``cats/1.jpg``, or ``train/cats/1.jpg`` with ``val`` and ``test`` beside ``train``."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from dataclasses import dataclass

from vitkit.data.decode import EXTENSIONS
from vitkit.data.labels import class_names, natural, some
from vitkit.data.source import Record, Skipped, Split
from vitkit.data.tree import Tree
from vitkit.errors import BadInput

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}

# files that accompany images everywhere and are no mistake
_ACCOMPANY = "txt md csv tsv parquet json xml yaml yml db ini html pdf log npz"
_SIDECARS = frozenset(f".{ending}" for ending in _ACCOMPANY.split())


@dataclass
class Listing:
    """What a reader of labels found: one path per record, in the same order."""

    records: list[Record]
    paths: list[str]
    classes: tuple[str, ...]
    skipped: list[Skipped]


def is_image(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() in EXTENSIONS


def list_folder(tree: Tree) -> Listing:
    """Records of a tree of class folders, in natural order of their paths.

    A single folder around everything is passed over. Images may lie deeper inside a class folder.

    Raises: BadInput for no images, images outside class folders only, an empty class folder, fewer than two classes.
    """
    files, folders = tree.files(), tree.folders()
    top = _top(files, folders)
    inside = top + "/" if top else ""
    children = sorted(
        {f[len(inside) :].split("/")[0] for f in folders if f.startswith(inside) and f != top}, key=natural
    )
    if not children:
        loose = [f for f in files if is_image(f)]
        raise BadInput(
            f"{tree.root} has {len(loose)} images but no class folders. Put the images of each class into a folder "
            "named after the class, or give a table with the columns path and label."
            if loose
            else f"{tree.root} holds no images ({', '.join(sorted(EXTENSIONS))})."
        )
    given = {child: SPLIT_NAMES[child.lower()] for child in children if child.lower() in SPLIT_NAMES}
    # a lone class called "test" beside other classes is a class; "train" with folders in it is not
    by_split = "train" in given.values() and any(
        f.startswith(f"{inside}{child}/") for child in given if given[child] == "train" for f in folders
    )
    roots: list[tuple[str, Split | None]]
    if by_split:
        roots = [(f"{inside}{child}/", split) for child, split in given.items()]
    else:
        roots = [(inside, None)]
    return _records(tree, files, folders, roots)


def _top(files: dict[str, tuple[int, str]], folders: set[str]) -> str:
    """The folder in which the classes or splits lie: descends while one folder wraps all the others."""
    top = ""
    while True:
        inside = top + "/" if top else ""
        children = {f for f in folders if f.startswith(inside) and f != top and "/" not in f[len(inside) :]}
        loose = any(f.startswith(inside) and "/" not in f[len(inside) :] and is_image(f) for f in files)
        if loose or len(children) != 1:
            return top
        only = next(iter(children))
        if not any(f.startswith(only + "/") for f in folders):
            return top
        if posixpath.basename(only).lower() in SPLIT_NAMES:
            return top
        top = only


def _records(
    tree: Tree,
    files: dict[str, tuple[int, str]],
    folders: set[str],
    roots: list[tuple[str, Split | None]],
) -> Listing:
    found: dict[str, tuple[str, Split | None]] = {}
    names: set[str] = set()
    skipped: list[Skipped] = []
    images_in: dict[str, int] = defaultdict(int)
    for root, split in roots:
        names |= {
            f[len(root) :] for f in folders if f.startswith(root) and f != root[:-1] and "/" not in f[len(root) :]
        }
        for path in files:
            if not path.startswith(root) or "/" not in path[len(root) :]:
                continue
            name = path[len(root) :].split("/")[0]
            extension = posixpath.splitext(path)[1].lower()
            if extension in EXTENSIONS:
                found[path] = (name, split)
                images_in[name] += 1
            elif extension not in _SIDECARS:
                skipped.append(Skipped(path, f"files ending in {extension or 'nothing'} are not read as images"))
    if not found:
        raise BadInput(f"The folders of {tree.root} hold no images ({', '.join(sorted(EXTENSIONS))}).")
    empty = sorted((n for n in names if images_in[n] == 0), key=natural)
    if empty:
        raise BadInput(
            f"{tree.root} has {'a class folder' if len(empty) == 1 else 'class folders'} without images: "
            f"{some([repr(n) for n in empty])}. Put images in, or remove {'it' if len(empty) == 1 else 'them'}."
        )
    classes = class_names(images_in, str(tree.root))
    number = {c: i for i, c in enumerate(classes)}
    paths = sorted(found, key=natural)
    records = [Record(key=p, label=number[found[p][0]], split=found[p][1]) for p in paths]
    return Listing(records, paths, classes, sorted(skipped, key=lambda s: natural(s.key)))
