"""Image files of a folder or an archive as pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitkit.data.decode import Reading, decode
from vitkit.data.look import digest
from vitkit.data.tree import Tree


class FilePixels:
    """Pixels of image files, decoded anew at every call.

    Args:
        tree: where the files are.
        paths: their paths in there.
        how: see :class:`Reading`.
    """

    decodes = True

    def __init__(self, tree: Tree, paths: Sequence[str], how: Reading) -> None:
        self.tree, self.paths, self.how = tree, list(paths), how

    def load(self, where: int, at_least: tuple[int, int] | None = None) -> tuple[np.ndarray, tuple[int, int]]:
        path = self.paths[where]
        return decode(self.tree.read(path), path, self.how, at_least)

    def look(self, where: int) -> tuple[np.ndarray, tuple[int, int], bytes]:
        path = self.paths[where]
        data = self.tree.read(path)
        # a JPEG's damage shows at any scale, since the whole stream is read; an eighth of it suffices for the hash
        array, size = decode(data, path, self.how, at_least=(64, 64))
        return array, size, digest(data)
