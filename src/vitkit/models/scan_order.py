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

    - ``raster``: row after row, each from the left.
    - ``snake``: row after row, every second one from the right, so that every step goes to a neighbour.
    - ``hilbert``: the Hilbert curve of the smallest square with a power of two as its side that holds the grid; cells
      outside the grid are skipped, so it has jumps unless the grid is such a square.
    - ``gilbert``: the generalised Hilbert curve of exactly this rectangle. Every step goes to a neighbour; at most one
      is diagonal, and none when the longer side is even.

    >>> scan_order(2, 3, "snake")
    tensor([0, 1, 2, 5, 4, 3])

    Args:
        h: rows, at least 1.
        w: columns, at least 1.
        kind: one of :data:`KINDS`.

    Returns: (N,) int64, a permutation of the cell numbers ``row·w + column``; see :func:`visit_index` for its inverse.

    Raises:
        UnknownName: no such order. BadInput: a side below 1.
    """
    return torch.tensor(_order(h, w, kind), dtype=torch.long)


def visit_index(order: Tensor) -> Tensor:
    """When each cell is visited: the inverse of a permutation (N,), so that ``visit_index(order)[order[t]] == t``.

    >>> visit_index(scan_order(2, 2, "snake"))
    tensor([0, 1, 3, 2])
    """
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


@lru_cache(maxsize=256)
def _order(h: int, w: int, kind: str) -> tuple[int, ...]:
    if kind not in _PATHS:
        raise unknown("scan order", kind, _PATHS, "vitkit.models.scan_order.KINDS")
    if h < 1 or w < 1:
        raise BadInput(f"A grid of {h}×{w} cells has no scan order; both sides must be at least 1.")
    return tuple(_PATHS[kind](h, w))


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


_PATHS: dict[str, Callable[[int, int], list[int]]] = {
    "raster": _raster,
    "snake": _snake,
    "hilbert": _hilbert,
    "gilbert": _gilbert,
}
#: names that :func:`scan_order` knows
KINDS = tuple(_PATHS)
