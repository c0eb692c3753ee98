"""Orders in which a path may visit points in space: what turns a cloud into a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkit.errors import BadInput, unknown

# B batch · N points

AXES = ("xyz", "xzy", "yxz", "yzx", "zxy", "zyx")
#: names that :func:`point_order` knows
POINT_ORDERS = ("hilbert", "morton", *AXES)


@torch.no_grad()
def point_order(points: Tensor, kind: str = "hilbert", bits: int = 5) -> Tensor:
    """The points of each cloud in the order in which a path through space visits them.

    The cube around a cloud is cut into ``2^bits`` cells a side, and the path goes from cell to cell:

    - ``hilbert``: the 3-D Hilbert curve, every step of which goes to a neighbouring cell.
    - ``morton``: the Z-order curve: the bits of x, y and z in turn.
    - ``xyz``, ``zyx`` and the other four: slab after slab along the first axis, row after row along the second inside a
      slab, cell after cell along the third inside a row.

    Points of one cell keep their order.

    >>> corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).unsqueeze(0)
    >>> point_order(corners, "hilbert", 1), point_order(corners, "zyx", 1)
    (tensor([[0, 1, 3, 2, 6, 7, 5, 4]]), tensor([[0, 4, 2, 6, 1, 5, 3, 7]]))

    Args:
        points: (B, N, 3), at any place and scale.
        kind: one of :data:`POINT_ORDERS`.
        bits: of a coordinate, 1 to 20.

    Returns: (B, N) int64, the number of the point at each place of the path.

    Raises:
        UnknownName: no such order. BadInput: other shapes or bits.
    """
    check_order(kind, bits)
    if points.ndim != 3 or points.shape[2] != 3:
        raise BadInput(f"point_order takes clouds (B, N, 3); it got {'×'.join(map(str, points.shape))}.")
    low = points.amin(1, keepdim=True)
    side = (points.amax(1, keepdim=True) - low).amax(2, keepdim=True)
    # the smallest normal number: all points at one place are one cell
    share = (points - low).float() / side.float().clamp(min=torch.finfo(torch.float32).tiny)
    cells = (share * 2**bits).long().clamp(0, 2**bits - 1)
    return _key(cells, kind, bits).argsort(dim=1, stable=True)


def check_order(kind: str, bits: int = 5) -> None:
    """Raises: UnknownName for a name not in :data:`POINT_ORDERS`; BadInput for ``bits`` outside 1 to 20."""
    if kind not in POINT_ORDERS:
        raise unknown("order of points", kind, POINT_ORDERS, "vitkit.models.point_order.POINT_ORDERS")
    if not 1 <= bits <= 20:
        raise BadInput(f"bits={bits} of a coordinate must be 1 to 20, or three of them do not fit into a key.")


def _key(cells: Tensor, kind: str, bits: int) -> Tensor:
    """When each cell (…, 3) is visited, as a number that grows along the path."""
    if kind in AXES:
        first, second, third = (cells[..., "xyz".index(axis)] for axis in kind)
        return (first << 2 * bits) | (second << bits) | third
    axes = list(cells.unbind(-1))
    return _interleave(_hilbert(axes, bits) if kind == "hilbert" else axes, bits)


def _interleave(axes: list[Tensor], bits: int) -> Tensor:
    key = torch.zeros_like(axes[0])
    for bit in reversed(range(bits)):
        for axis in axes:
            key = (key << 1) | ((axis >> bit) & 1)
    return key


def _hilbert(axes: list[Tensor], bits: int) -> list[Tensor]:
    """Coordinates → the digits of the place on the Hilbert curve, one bit of every axis in turn.

    Skilling's transform: undo the turns and mirrors of the sub-cubes from the coarsest level down, then undo the Gray
    code (Programming the Hilbert curve, AIP Conference Proceedings 707, 2004).
    """
    axes = list(axes)
    for level in reversed(range(1, bits)):
        below = (1 << level) - 1
        for i in range(len(axes)):
            mirrored = ((axes[i] >> level) & 1).bool()
            swap = torch.where(mirrored, 0, (axes[0] ^ axes[i]) & below)
            axes[i] = axes[i] ^ swap
            axes[0] = axes[0] ^ torch.where(mirrored, below, swap)
    for i in range(1, len(axes)):
        axes[i] = axes[i] ^ axes[i - 1]
    flip = torch.zeros_like(axes[0])
    for level in range(1, bits):
        flip = flip ^ (((axes[-1] >> level) & 1) * ((1 << level) - 1))
    return [axis ^ flip for axis in axes]
