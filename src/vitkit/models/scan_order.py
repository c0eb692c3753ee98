"""Orders in which a path may visit the cells of a grid: what turns a 2-D grid into a sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vitkit.errors import BadInput, unknown

# h rows · w columns · N = h·w cells, numbered row by row


def scan_order(h: int, w: int, kind: str = "raster") -> Tensor:
    """The cells of an h×w grid in the order in which a path visits them.

    - ``raster``: row after row, each from the left. ``column``: column after column, each from the top.
    - ``snake`` or ``snake_h``: row after row, every second one from the right, so that every step goes to a neighbour.
      ``snake_v``: the same by columns.
    - ``hilbert``: the Hilbert curve of the smallest square with a power of two as its side that holds the grid; cells
      outside the grid are skipped, so it has jumps unless the grid is such a square.
    - ``gilbert``: the generalised Hilbert curve of exactly this rectangle. Every step goes to a neighbour; at most one
      is diagonal, and none when the longer side is even.
    - ``diagonal``: line after line parallel to the main diagonal, from the lower left corner to the upper right one,
      each from the top. ``antidiagonal``: parallel to the other diagonal, from the upper left corner on.
    - ``local:k``: window after window of k×k cells, rows inside (k = 2 if left out); windows at the edge are smaller.
    - ``atrous:r``: the r² grids of every r-th cell, one after another, each by rows (r = 2 if left out).
    - ``spiral_in``: clockwise along the border from the upper left corner, then inwards. ``spiral_out``: its reverse.
    - ``random:seed``: the same shuffle for one seed and grid (seed 0 if left out).

    ``_rev`` behind a name walks it backwards: ``raster_rev``, ``local_rev:3``.

    >>> scan_order(2, 3, "snake"), scan_order(2, 3, "column_rev")
    (tensor([0, 1, 2, 5, 4, 3]), tensor([5, 2, 4, 1, 3, 0]))

    Args:
        h: rows, at least 1.
        w: columns, at least 1.
        kind: one of :data:`KINDS`, with its number behind a colon where it has one.

    Returns: (N,) int64, a permutation of the cell numbers ``row·w + column``; see :func:`visit_index` for its inverse.

    Raises:
        UnknownName: no such order. BadInput: a side below 1, or a number that the order cannot have.

    Papers: the four directions of rows and columns are VMamba's (arXiv:2401.10166), eight with the diagonals the
        omnidirectional scan of RS-Mamba (arXiv:2404.02668), windows LocalMamba's (arXiv:2403.09338), every r-th cell
        EfficientVMamba's (arXiv:2403.09977).
    """
    return torch.tensor(_order(h, w, kind), dtype=torch.long)


def visit_index(order: Tensor) -> Tensor:
    """When each cell is visited: the inverse of a permutation (N,), so that ``visit_index(order)[order[t]] == t``.

    >>> visit_index(scan_order(2, 2, "snake"))
    tensor([0, 1, 3, 2])
    """
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


# settings alone decide, and numbers made with numpy are nothing a compiler should look into
@torch.compiler.assume_constant_result
@lru_cache(maxsize=256)
def _order(h: int, w: int, kind: str) -> tuple[int, ...]:
    name, _, number = kind.partition(":")
    backwards = name.endswith("_rev")
    name = name.removesuffix("_rev")
    if name not in _PATHS and name not in _NUMBERED:
        raise unknown("scan order", kind, KINDS, "vitkit.models.scan_order.KINDS")
    if h < 1 or w < 1:
        raise BadInput(f"A grid of {h}×{w} cells has no scan order; both sides must be at least 1.")
    if name in _PATHS:
        if number:
            raise BadInput(f"The scan order {name!r} takes no number; write {name!r} in place of {kind!r}.")
        cells = _PATHS[name](h, w)
    else:
        path, default, least = _NUMBERED[name]
        if number and not number.isdecimal():
            raise BadInput(f"The scan order {kind!r} needs a whole number behind the colon, such as {name}:{default}.")
        value = int(number) if number else default
        if value < least:
            raise BadInput(f"The scan order {kind!r} needs a number of at least {least}, such as {name}:{default}.")
        cells = path(h, w, value)
    return tuple(reversed(cells) if backwards else cells)


def _raster(h: int, w: int) -> list[int]:
    return list(range(h * w))


def _snake(h: int, w: int) -> list[int]:
    cells = np.arange(h * w).reshape(h, w)
    cells[1::2] = cells[1::2, ::-1].copy()
    return cells.ravel().tolist()


def _hilbert(h: int, w: int) -> list[int]:
    # visit numbers of a square that is entered at its upper left cell and left at its upper right one
    visits = np.zeros((1, 1), dtype=np.int64)
    while len(visits) < max(h, w):
        count = visits.size
        mirrored = visits[::-1, ::-1].T
        visits = np.block([[visits.T, mirrored + 3 * count], [visits + count, visits + 2 * count]])
    # sorting the visit numbers of the cells inside the grid skips the others
    return np.argsort(visits[:h, :w], axis=None).tolist()


def _gilbert(h: int, w: int) -> list[int]:
    """Halve a rectangle until strips of one cell are left.

    A rectangle is (row, column of its first cell, axis of its major side, signed lengths of major and minor side); the
    path enters at that cell and leaves at the far end of the major side.
    """
    cells: list[int] = []
    todo = [(0, 0, 1, w, h) if w >= h else (0, 0, 0, h, w)]
    while todo:
        row, col, axis, a, b = todo.pop()
        if abs(b) == 1 or abs(a) == 1:
            along, length = (axis, a) if abs(b) == 1 else (1 - axis, b)
            step = 1 if length > 0 else -1
            stride = step * (w if along == 0 else 1)
            start = row * w + col
            cells += range(start, start + stride * abs(length), stride)
            continue
        unit_a, unit_b = (1 if a > 0 else -1), (1 if b > 0 else -1)
        half_a, half_b = a // 2, b // 2
        if 2 * abs(a) > 3 * abs(b):
            if half_a % 2 and abs(a) > 2:
                half_a += unit_a
            parts = [(0, 0, axis, half_a, b), (half_a, 0, axis, a - half_a, b)]
        else:
            if half_b % 2 and abs(b) > 2:
                half_b += unit_b
            parts = [
                (0, 0, 1 - axis, half_b, half_a),
                (0, half_b, axis, a, b - half_b),
                (a - unit_a, half_b - unit_b, 1 - axis, -half_b, half_a - a),
            ]
        for shift_a, shift_b, part_axis, major, minor in reversed(parts):
            down, right = (shift_a, shift_b) if axis == 0 else (shift_b, shift_a)
            todo.append((row + down, col + right, part_axis, major, minor))
    return cells


def _column(h: int, w: int) -> list[int]:
    return np.arange(h * w).reshape(h, w).T.ravel().tolist()


def _snake_v(h: int, w: int) -> list[int]:
    cells = np.arange(h * w).reshape(h, w).T.copy()
    cells[1::2] = cells[1::2, ::-1].copy()
    return cells.ravel().tolist()


def _diagonal(h: int, w: int) -> list[int]:
    row, column = np.divmod(np.arange(h * w), w)
    # the last key of lexsort comes first
    return np.lexsort((row, column - row)).tolist()


def _antidiagonal(h: int, w: int) -> list[int]:
    row, column = np.divmod(np.arange(h * w), w)
    return np.lexsort((row, column + row)).tolist()


def _local(h: int, w: int, side: int) -> list[int]:
    row, column = np.divmod(np.arange(h * w), w)
    return np.lexsort((column, row, column // side, row // side)).tolist()


def _atrous(h: int, w: int, rate: int) -> list[int]:
    row, column = np.divmod(np.arange(h * w), w)
    return np.lexsort((column, row, column % rate, row % rate)).tolist()


def _spiral_in(h: int, w: int) -> list[int]:
    cells, out = np.arange(h * w).reshape(h, w), []
    while cells.size:
        out += cells[0].tolist()
        # what is left, turned so that its next side is the upper one
        cells = np.rot90(cells[1:])
    return out


def _spiral_out(h: int, w: int) -> list[int]:
    return _spiral_in(h, w)[::-1]


def _random(h: int, w: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(h * w).tolist()


_PATHS: dict[str, Callable[[int, int], list[int]]] = {
    "raster": _raster,
    "column": _column,
    "snake": _snake,
    "snake_h": _snake,
    "snake_v": _snake_v,
    "hilbert": _hilbert,
    "gilbert": _gilbert,
    "diagonal": _diagonal,
    "antidiagonal": _antidiagonal,
    "spiral_in": _spiral_in,
    "spiral_out": _spiral_out,
}
# path, its number if none is given, the smallest allowed
_NUMBERED: dict[str, tuple[Callable[[int, int, int], list[int]], int, int]] = {
    "local": (_local, 2, 1),
    "atrous": (_atrous, 2, 1),
    "random": (_random, 0, 0),
}
#: names that :func:`scan_order` knows; each may have ``_rev`` behind it
KINDS = (*_PATHS, *_NUMBERED)
#: the four directions of VMamba, and the eight of the omnidirectional scan
CROSS = ("raster", "column", "raster_rev", "column_rev")
OMNI = (*CROSS, "diagonal", "antidiagonal", "diagonal_rev", "antidiagonal_rev")

# -- two images, and cubes -------------------------------------------------------------------------------------------

PAIRS = ("sequential", "interleave", "parallel")


def join_pair(first: Tensor, second: Tensor, how: str = "sequential") -> Tensor:
    """Two sequences of one shape as one: two dates or two sensors before a scan.

    >>> a, b = torch.tensor([[[1], [2]]]), torch.tensor([[[3], [4]]])
    >>> [join_pair(a, b, how).tolist() for how in PAIRS]
    [[[[1], [2], [3], [4]]], [[[1], [3], [2], [4]]], [[[1, 3], [2, 4]]]]

    Args:
        first, second: (B, L, D).
        how: "sequential" (all of the first, then the second), "interleave" (step by step in turn) or "parallel"
            (channels side by side).

    Returns: (B, 2L, D), or (B, L, 2D) for "parallel"; :func:`split_pair` is the inverse.

    Raises:
        UnknownName: another way. BadInput: the shapes differ.
    """
    _known_pair(how)
    if first.shape != second.shape or first.ndim != 3:
        raise BadInput(f"A pair needs two sequences (B, L, D) of one shape, not {first.shape} and {second.shape}.")
    if how == "interleave":
        return torch.stack([first, second], 2).flatten(1, 2)
    return torch.cat([first, second], 1 if how == "sequential" else 2)


def split_pair(joined: Tensor, how: str = "sequential") -> tuple[Tensor, Tensor]:
    """The two sequences that :func:`join_pair` made one of.

    Raises:
        UnknownName: another way. BadInput: the joined axis has an odd length.
    """
    _known_pair(how)
    axis = 2 if how == "parallel" else 1
    if joined.shape[axis] % 2:
        raise BadInput(f"A joined pair has an even length; axis {axis} of {tuple(joined.shape)} has not.")
    if how == "interleave":
        first, second = joined.unflatten(1, (-1, 2)).unbind(2)
    else:
        first, second = joined.chunk(2, axis)
    return first, second


def _known_pair(how: str) -> None:
    if how not in PAIRS:
        raise unknown("way to join a pair", how, PAIRS, "vitkit.models.scan_order.PAIRS")


CUBES = ("spectral", "spatial", "joint")


def cube_order(bands: int, h: int, w: int, kind: str = "spectral", plane: str = "raster") -> Tensor:
    """The cells of a cube of ``bands`` planes of h×w in the order of a path, as numbers ``(band·h + row)·w + column``.

    - ``spectral``: all bands of a cell, then the next cell.
    - ``spatial``: all cells of a band, then the next band.
    - ``joint``: like ``spatial``, with every second band backwards: a step between bands stays at its cell.

    With one band all of them are the order of the plane.

    >>> cube_order(2, 1, 2, "spectral"), cube_order(2, 1, 2, "joint")
    (tensor([0, 2, 1, 3]), tensor([0, 1, 3, 2]))

    Args:
        bands: spectral channels or dates, at least 1.
        h, w: sides of a plane.
        kind: one of :data:`CUBES`.
        plane: order of the cells, see :func:`scan_order`.

    Returns: (bands·h·w,) int64.

    Raises:
        UnknownName: no such order. BadInput: a side below 1.
    """
    if kind not in CUBES:
        raise unknown("order of a cube", kind, CUBES, "vitkit.models.scan_order.CUBES")
    if bands < 1:
        raise BadInput(f"A cube of {bands} bands has no scan order; it needs at least 1.")
    cells = torch.arange(bands).unsqueeze(1) * (h * w) + scan_order(h, w, plane)
    if kind == "spectral":
        return cells.T.flatten()
    if kind == "joint":
        cells[1::2] = cells[1::2].flip(1)
    return cells.flatten()
