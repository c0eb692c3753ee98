"""TILES: a large field in overlapping tiles, stitched without seams."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import to_2tuple
from torch import Tensor, nn

from vitkit.errors import BadInput

# B batch · C, K channels in and out · T tiles · H×W cells · m scale of the model


class Tiles(nn.Module):
    """Runs a dense model on overlapping windows of its input and puts the middle of every answer in its place.

    Along an axis of L cells with ``div`` tiles and halo o, all windows have ⌈L/div⌉ + 2o cells: inner tiles reach o
    beyond both borders, tiles at an edge 2o inward. Windows go through the model as one batch, the halo (m times as
    wide in the output) is cut off, and every output cell is written by exactly one tile. Attention over N tokens costs
    N² on the whole field and about N²/div² in tiles. A convolutional model whose receptive field reaches no farther
    than the halo gives exactly what it gives untiled; a model with attention loses what lies beyond it.

    Args:
        model: (B, C, H, W) → (B, K, m·H, m·W), any whole m for windows of any size.
        div: tiles per axis, or (rows, columns); 1 leaves an axis whole.
        halo: o in cells of latitude (rows); longitude (columns) gets twice as many. A pair names both. The authors'
            ``overlap`` is the sum of both sides, that is 2o.
        multiple: window sides are rounded up to multiples of this; None: the model's ``patch_size``, if it has one.
        cyclic: the columns are a circle, so that windows reach across the first and last meridian.
        chunk: at most so many windows in one call of the model; None: all.
        spread: share the windows among the processes of ``group`` (None: all) where ``torch.distributed`` is
            initialised; each computes its part and gets the whole answer. All processes must bring the same input.
            Gradients are summed over the processes, which is right when those of the parameters are then averaged, as
            DistributedDataParallel does.

    Shape: (B, C, H, W) → (B, K, m·H, m·W). Named arguments go to the model; tensors with B rows follow their fields.
    Raises: BadInput if an option is out of range, there are more tiles than cells, a window can be no multiple of the
        patch, or the model's answer is no whole multiple of its window.
    Paper: TILES of ORBIT-2: Scaling Exascale Vision Foundation Models for Weather and Climate Downscaling,
        arXiv:2505.04802.
    Departs from the paper: fields that ``div`` does not divide get tiles that differ by one cell, in windows of equal
        size; cyclic columns and ``chunk`` are ours. The authors cut the tiles in the data loader, each process
        training on its own.
    """

    def __init__(
        self,
        model: nn.Module,
        div: int | tuple[int, int] = 4,
        halo: int | tuple[int, int] = 4,
        multiple: int | tuple[int, int] | None = None,
        cyclic: bool = False,
        chunk: int | None = None,
        spread: bool = False,
        group: Any = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.div = to_2tuple(div)
        self.halo = (halo, 2 * halo) if isinstance(halo, int) else tuple(halo)
        self.multiple = to_2tuple(getattr(model, "patch_size", 1) if multiple is None else multiple)
        if min(*self.div, *self.multiple) < 1 or min(self.halo) < 0 or (chunk is not None and chunk < 1):
            raise BadInput(
                f"div={div}, multiple={self.multiple} and chunk={chunk} must be at least 1, halo={halo} at least 0."
            )
        self.cyclic, self.chunk, self.spread, self.group = cyclic, chunk, spread, group

    def forward(self, x: Tensor, **named: Any) -> Tensor:
        if self.div == (1, 1):
            return self.model(x, **named)
        axes = [
            _Axis(x.shape[2], self.div[0], self.halo[0], self.multiple[0], False),
            _Axis(x.shape[3], self.div[1], self.halo[1], self.multiple[1], self.cyclic),
        ]
        batch, (rows, cols) = len(x), axes
        cut = x.index_select(2, rows.cells(x.device)).index_select(3, cols.cells(x.device))
        cut = cut.unflatten(3, (cols.parts, cols.size)).unflatten(2, (rows.parts, rows.size))
        # (tiles of a column, tiles of a row, B, C, …) → (T·B, C, …)
        windows = cut.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
        tiles = rows.parts * cols.parts
        named = {
            name: value.repeat(tiles, *[1] * (value.ndim - 1)) if _follows(value, batch) else value
            for name, value in named.items()
        }
        y = self._answers(windows, named)
        scales = [y.shape[i] / axis.size if y.ndim == 4 else 0.0 for i, axis in ((-2, rows), (-1, cols))]
        if any(scale < 1 or scale != int(scale) for scale in scales):
            raise BadInput(
                f"The model turned windows of {rows.size}×{cols.size} into {tuple(y.shape)}; tiles need a model that "
                "gives (B, K, m·H, m·W) with a whole m."
            )
        y = y.unflatten(0, (rows.parts, cols.parts, batch)).permute(2, 3, 0, 4, 1, 5)
        y = y.flatten(4).flatten(2, 3)  # all answers side by side, halos included
        return y.index_select(2, rows.kept(int(scales[0]), x.device)).index_select(
            3, cols.kept(int(scales[1]), x.device)
        )

    def _answers(self, windows: Tensor, named: dict[str, Any]) -> Tensor:
        count = len(windows)
        if not (self.spread and dist.is_available() and dist.is_initialized()):
            return self._run(windows, named)
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        share = math.ceil(count / world)
        # the last processes repeat the last window, as all must send equally many
        mine = torch.arange(rank * share, (rank + 1) * share, device=windows.device).clamp(max=count - 1)
        own = {name: value[mine] if _follows(value, count) else value for name, value in named.items()}
        answers: Tensor = _Gather.apply(self._run(windows[mine], own), self.group)  # type: ignore[no-untyped-call]
        return answers[:count]

    def _run(self, windows: Tensor, named: dict[str, Any]) -> Tensor:
        size = len(windows)
        if self.chunk is None or size <= self.chunk:
            return self.model(windows, **named)
        found = []
        for start in range(0, size, self.chunk):
            at = slice(start, start + self.chunk)
            own = {name: value[at] if _follows(value, size) else value for name, value in named.items()}
            found.append(self.model(windows[at], **own))
        return torch.cat(found)


def tiles(model: nn.Module, div: int | tuple[int, int] = 4, halo: int | tuple[int, int] = 4, **options: Any) -> Tiles:
    """``model`` in tiles; see :class:`Tiles` for all options.

    >>> smooth = nn.AvgPool2d(3, stride=1, padding=1)
    >>> x = torch.rand(1, 2, 12, 16)
    >>> bool(torch.equal(tiles(smooth, div=3, halo=1)(x), smooth(x)))
    True
    """
    return Tiles(model, div, halo, **options)


class _Axis:
    """Where the windows of one axis lie, and which of their cells are kept."""

    def __init__(self, length: int, parts: int, halo: int, multiple: int, cyclic: bool) -> None:
        if parts > length:
            raise BadInput(f"div={parts} is more tiles than the {length} cells of an axis; use at most {length}.")
        self.length, self.parts, self.cyclic = length, parts, cyclic and parts > 1
        # tiles i … i+1; they differ by one cell where the axis does not divide
        self.borders = [i * length // parts for i in range(parts + 1)]
        wanted = length if parts == 1 else -(-length // parts) + 2 * halo
        self.size = min(-(-wanted // multiple) * multiple, length)
        if self.size % multiple:
            raise BadInput(
                f"Windows as long as an axis of {length} cells are no multiple of the patch of {multiple}; cut the "
                f"field to {length // multiple * multiple} cells, or use a smaller halo than {halo}."
            )
        starts = [border - halo for border in self.borders[:-1]]
        self.starts = starts if self.cyclic else [min(max(s, 0), length - self.size) for s in starts]

    def cells(self, device: torch.device) -> Tensor:
        """Cells of all windows, one window after the other."""
        cells = torch.tensor(self.starts, device=device)[:, None] + torch.arange(self.size, device=device)
        return cells.flatten() % self.length

    def kept(self, scale: int, device: torch.device) -> Tensor:
        """For every output cell, where it stands among the answers of all windows."""
        tile = torch.arange(self.parts, device=device).repeat_interleave(
            torch.tensor(self.borders, device=device).diff() * scale
        )
        start = torch.tensor(self.starts, device=device)[tile] * scale
        local = (torch.arange(self.length * scale, device=device) - start) % (self.length * scale)
        return tile * self.size * scale + local


def _follows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows


class _Gather(torch.autograd.Function):
    """The parts of all processes one after the other; backward sums what all of them send to a part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.rows = group, len(part)
        whole = part.new_empty((dist.get_world_size(group) * len(part), *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return grad[start : start + ctx.rows], None
