"""Orders in which a path may visit the cells of several dates, or of several bands, of one grid."""

from __future__ import annotations

from torch import Tensor

from vitkit.errors import BadInput, unknown
from vitkit.models.scan_order import cube_order

# T dates or bands · h rows · w columns · cells are numbered (date·h + row)·w + column

#: how dates follow each other on a path
DATES = ("sequential", "interleave", "joint", "parallel")
_CUBES = {"sequential": "spatial", "interleave": "spectral", "joint": "joint", "parallel": "spectral"}


def time_order(grid: tuple[int, ...], kind: str = "raster") -> Tensor:
    """The cells of a grid (h, w) or (T, h, w) in the order in which a path visits them.

    ``kind`` is an order of the plane, with one of these and a slash before it, or one of these alone (by rows):

    - ``sequential``: all cells of a date, then the next date; what a plain name means. For bands: the spatial scan.
    - ``interleave``: all dates of a cell, then the next cell: a₁, b₁, a₂, b₂, … For bands: the spectral scan.
    - ``joint``: like ``sequential``, with every second date backwards: a step between dates stays at its cell.
    - ``parallel``: the dates walk side by side. The order is that of ``interleave``; T cells in line are one step,
      and a scan with one signal a date makes of them what it makes of channels.

    With one date all of them are the order of the plane.

    >>> time_order((2, 1, 2), "interleave"), time_order((2, 1, 2), "joint/raster_rev"), time_order((1, 2), "joint")
    (tensor([0, 2, 1, 3]), tensor([1, 0, 2, 3]), tensor([0, 1]))

    Args:
        grid: (h, w) or (T, h, w).
        kind: such as "snake", "interleave" or "joint/hilbert"; orders of the plane as in
            :func:`~vitkit.models.scan_order.scan_order`.

    Returns: (T·h·w,) int64, a permutation; :func:`~vitkit.models.scan_order.visit_index` is its inverse.

    Raises:
        UnknownName: no such order. BadInput: a grid of other axes, or a side below 1.

    Paper: the three scans of two dates are those of ChangeMamba, arXiv:2404.03425; for two images see
        :func:`~vitkit.models.scan_order.join_pair`.
    """
    if len(grid) not in (2, 3):
        raise BadInput(f"A path needs a grid (h, w) or (T, h, w); it got {'×'.join(map(str, grid))}.")
    how, plane = split_kind(kind)
    dates, h, w = (1, *grid) if len(grid) == 2 else grid
    return cube_order(dates, h, w, _CUBES[how], plane)


def split_kind(kind: str) -> tuple[str, str]:
    """How dates follow each other, and the order of the plane.

    >>> split_kind("snake"), split_kind("joint"), split_kind("interleave/local:2")
    (('sequential', 'snake'), ('joint', 'raster'), ('interleave', 'local:2'))

    Raises: UnknownName for another word before the slash.
    """
    how, slash, plane = kind.partition("/")
    if not slash:
        return (kind, "raster") if kind in DATES else ("sequential", kind)
    if how not in DATES:
        raise unknown("scan order of dates", how, DATES, "vitkit.models.time_order.DATES")
    return how, plane or "raster"
