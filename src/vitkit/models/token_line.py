"""Tokens of a grid as sequences: along which paths, where prefix tokens stand in them, and back again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput, unknown
from vitkit.models.cells import as_tokens
from vitkit.models.layout import TokenLayout
from vitkit.models.scan_order import visit_index
from vitkit.models.time_order import split_kind, time_order

# B batch · P prefix tokens · N patches · R = P+N or N rows · K paths · E channels · T dates

PLACES = ("first", "middle", "last")


class Paths(NamedTuple):
    """K orders of R rows, for all images or for each.

    Attributes:
        rows: (R, K) or (B, R, K), the row that stands at each place of each path.
        places: (R, K) or (B, R, K), the place of each row: the inverse.
        still: (B, R, K) bool, True at places that hold padding; None without any.
    """

    rows: Tensor
    places: Tensor
    still: Tensor | None


class TokenLine(nn.Module):
    """Lines the rows of a token tensor up along K paths.

    Merged, dropped, permuted and padded tokens keep their places: a row takes the turn of the cell in which its centre
    lies, rows of one cell follow each other as they stand, and padding comes last.

    Args:
        orders: names for :func:`~vitkit.models.time_order.time_order`, one a path.
        mirrored: walk every path backwards too, behind all others; K is then twice the number of orders.
        prefix: where prefix tokens stand in every path: "first", "middle" or "last".
        grid: (h, w) or (T, h, w), whose paths are kept; those of other grids are made when they are met.

    Attributes:
        parallel: the dates of a grid (T, h, w) walk side by side, see :meth:`apart`.

    Raises: BadInput without an order, or with some that are parallel and some that are not. UnknownName: no such order
        or place.
    """

    cells: Tensor

    def __init__(
        self,
        orders: tuple[str, ...],
        mirrored: bool = False,
        prefix: str = "middle",
        grid: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if prefix not in PLACES:
            raise unknown("place of prefix tokens in a path", prefix, PLACES, "vitkit show mamba")
        if not orders:
            raise BadInput('A scan needs at least one order, such as "raster".')
        beside = {split_kind(order)[0] == "parallel" for order in orders}
        if len(beside) > 1:
            raise BadInput(f"The orders {', '.join(orders)} must all be parallel, or none of them.")
        self.orders, self.mirrored, self.prefix, self.grid = tuple(orders), mirrored, prefix, grid
        self.parallel = beside.pop()
        self.num_paths = len(orders) * (2 if mirrored else 1)
        self.register_buffer("cells", self._cells(grid or (1, 1)), persistent=False)

    def paths(self, layout: TokenLayout, batch: int, device: torch.device, num_prefix: int | None = None) -> Paths:
        """The paths of these tokens.

        Args:
            layout: of the tokens. batch: B. device: of the result.
            num_prefix: prefix rows that are in line; None: all of the layout.
        """
        count = layout.num_prefix if num_prefix is None else num_prefix
        if layout.is_full_grid:
            cells = self.cells if layout.grid == self.grid else self._cells(layout.grid)
            return self._static(cells.to(device), count)
        visits = self._visits(layout, batch, device)
        return self.by_keys(visits, count, layout.valid)

    def by_keys(self, keys: Tensor, num_prefix: int, valid: Tensor | None = None) -> Paths:
        """Paths on which patches stand by rising ``keys`` (B, N, number of orders); equal ones as they are."""
        batch, num, orders = keys.shape
        if valid is not None:
            last = torch.full_like(keys, torch.inf)
            keys = torch.where(valid.unsqueeze(-1), keys, last)
            seen = valid.sum(1)
        else:
            seen = torch.full((batch,), num, device=keys.device)
        rank = keys.argsort(dim=1, stable=True).argsort(dim=1).to(torch.float32)
        # half a place in front of the patch that the prefix precedes
        before = {"first": torch.zeros_like(seen), "middle": seen // 2, "last": seen}[self.prefix] - 0.5
        prefix = before.to(torch.float32)[:, None, None].expand(-1, num_prefix, orders)
        index = torch.cat([prefix, rank], 1).argsort(dim=1, stable=True)
        still = None
        if valid is not None:
            real = torch.nn.functional.pad(valid, (num_prefix, 0), value=True)
            still = ~real.unsqueeze(-1).expand(-1, -1, orders).gather(1, index)
        if self.mirrored:
            index = torch.cat([index, index.flip(1)], 2)
            still = None if still is None else torch.cat([still, still.flip(1)], 2)
        return Paths(index, index.argsort(dim=1), still)

    def gather(self, rows: Tensor, paths: Paths) -> Tensor:
        """(B, R, E) → (B, R, K, E), along every path."""
        flat = paths.rows.flatten(-2)
        if flat.ndim == 1:
            out = rows.index_select(1, flat)
        else:
            out = rows.gather(1, flat.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
        return out.unflatten(1, paths.rows.shape[-2:])

    def restore(self, lines: Tensor, paths: Paths) -> Tensor:
        """(B, R, K, E) → (B, R, K, E): each path's values at the rows they belong to; undoes :meth:`gather`."""
        flat = paths.places * self.num_paths + torch.arange(self.num_paths, device=lines.device)
        flat, lines = flat.flatten(-2), lines.flatten(1, 2)
        if flat.ndim == 1:
            out = lines.index_select(1, flat)
        else:
            out = lines.gather(1, flat.unsqueeze(-1).expand(-1, -1, lines.shape[-1]))
        return out.unflatten(1, paths.rows.shape[-2:])

    def side_by_side(self, layout: TokenLayout, num_prefix: int) -> int:
        """T where dates walk side by side, else 1.

        Raises: BadInput if ``num_prefix`` rows are in line with them, which belong to no date.
        """
        if not self.parallel or len(layout.grid) != 3 or layout.grid[0] == 1:
            return 1
        layout.require_full_grid("A parallel scan of dates")
        if num_prefix:
            raise BadInput('Prefix tokens have no place in a parallel scan of dates; use prefix="attend".')
        return layout.grid[0]

    def _cells(self, grid: tuple[int, ...]) -> Tensor:
        """(N, number of orders)."""
        return torch.stack([time_order(grid, kind) for kind in self.orders], 1)

    def _static(self, cells: Tensor, count: int) -> Paths:
        num, orders = cells.shape
        if count:
            at = {"first": 0, "middle": num // 2, "last": num}[self.prefix]
            prefix = torch.arange(count, device=cells.device).unsqueeze(1).expand(-1, orders)
            cells = torch.cat([cells[:at] + count, prefix, cells[at:] + count])
        if self.mirrored:
            cells = torch.cat([cells, cells.flip(0)], 1)
        return Paths(cells, cells.argsort(dim=0), None)

    def _visits(self, layout: TokenLayout, batch: int, device: torch.device) -> Tensor:
        """When the cell of each row's centre is visited, (B, N, number of orders)."""
        if len(layout.grid) != 2:
            raise BadInput(
                f"Merged or padded tokens of the grid {'×'.join(map(str, layout.grid))} have no place on a path: their "
                "centres say nothing about the frame. Scan before the token reduction."
            )
        h, w = layout.grid
        coords = layout.coordinates(device)
        coords = coords.expand(batch, -1, -1)
        row, column = (coords[..., 0] * h).long().clamp(0, h - 1), (coords[..., 1] * w).long().clamp(0, w - 1)
        visit = torch.stack([visit_index(order) for order in self._cells((h, w)).unbind(1)], 1).to(device)
        return visit[row * w + column].to(torch.float32)

    def extra_repr(self) -> str:
        return f"orders={self.orders}, mirrored={self.mirrored}, prefix={self.prefix!r}"


def apart(lines: Tensor, dates: int) -> Tensor:
    """Lines (B, T·L, K, E) in which T dates take turns → one line for each date, (B·T, L, K, E)."""
    return lines if dates == 1 else lines.unflatten(1, (-1, dates)).transpose(1, 2).flatten(0, 1)


def in_turn(lines: Tensor, dates: int) -> Tensor:
    """Undoes :func:`apart`."""
    return lines if dates == 1 else lines.unflatten(0, (-1, dates)).transpose(1, 2).flatten(1, 2)


def on_planes(module: nn.Module, rows: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A module on maps (B, E, h, w), on the patch rows (B, N, E) of a grid (h, w), or of every date of (T, h, w)."""
    h, w = grid[-2:]
    maps = module(rows.unflatten(1, (-1, h * w)).flatten(0, 1).transpose(1, 2).unflatten(2, (h, w)))
    return as_tokens(maps).unflatten(0, (rows.shape[0], -1)).flatten(1, 2)
