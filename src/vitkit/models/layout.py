"""What a block must know about its tokens besides their values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


class Tap(Protocol):
    """Looks at, and may replace, a tensor at a named call point of the host (see :mod:`vitkit.anatomy`)."""

    def wants(self, site: str, depth: int | None) -> bool: ...

    def __call__(self, site: str, value: Tensor, depth: int | None, layout: TokenLayout) -> Tensor: ...


class Rotation(Protocol):
    """Rotary tables prepared once per forward for the patch rows (see :mod:`vitkit.models.parts.positions.rope`)."""

    def follow(self, layout: TokenLayout) -> TokenLayout:
        """``layout`` with tables for its rows as they are now; the same object while no row has moved."""
        ...


@dataclass(frozen=True, eq=False)
class LogitEdit:
    """One named contributor to the attention logits.

    Args:
        name: shown in errors and reports, e.g. ``"landmark mask"``.
        kind: ``"add"``: ``fn(q, k, layout)`` returns a tensor broadcastable to (B, H, P+N, P+N) that is added;
            ``"set"``: ``fn(logits, layout)`` returns new logits. All ``"add"`` edits run before any ``"set"``.
        fn: see ``kind``.
    """

    name: str
    kind: Literal["add", "set"]
    fn: Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Describes the rows of a token tensor ``x`` of shape (B, P+N, D): P prefix rows first, then N patch rows.

    A layout is made anew in every forward and *returned* by every block; it is never read from the model, so
    merging, dropping, padding and prompting stay correct under activation checkpointing and export.

    Args:
        grid: cells of the original patch grid, ``(h, w)`` or ``(t, h, w)``; N_1 = ∏ grid.
        prefix: ordered ``(name, count)`` of the prefix tokens, e.g. ``(("class", 1), ("register", 4))``.
        coords: (N, 2) or (B, N, 2) centres as (row, column) in [0, 1]; None: the cells of ``grid`` in raster order.
        valid: (B, N) bool, False for padding; None: all valid. An invalid row is never a key and never pooled.
        sizes: (B, N) how many original patches a row stands for; None: one each.
        source: (B, N_1) index of the row that now holds original patch j, -1 when it was dropped; None: identity.
            This is the one-hot source map (B, N, N_1) stored by its column indices.
        scale_id: (B, N) integer scale of a multi-scale token; None: one scale.
        edits: contributors to the attention logits, see :class:`LogitEdit`.
        cond: per-call conditioning given to ``embed`` (dates, variables, resolution …).
        tap: the active call-point observer, None in ordinary runs.
        rotation: rotary tables of a host that turns queries and keys, None in others; they find out by themselves that
            rows were merged, dropped or permuted.
        memory: what blocks leave for later blocks, by the name of the method; a block returns a layout with it.
        aux: auxiliary losses, written by parts as ``aux[(name, depth)] = scalar`` (overwritten, so that a
            recomputed block is harmless).
    """

    grid: tuple[int, ...]
    prefix: tuple[tuple[str, int], ...] = ()
    coords: Tensor | None = None
    valid: Tensor | None = None
    sizes: Tensor | None = None
    source: Tensor | None = None
    scale_id: Tensor | None = None
    edits: tuple[LogitEdit, ...] = ()
    cond: Mapping[str, Any] = field(default_factory=dict)
    tap: Tap | None = None
    rotation: Rotation | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)
    aux: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @property
    def num_prefix(self) -> int:
        """P, the number of prefix rows."""
        return sum(count for _, count in self.prefix)

    @property
    def num_original(self) -> int:
        """N_1, the number of patches before any merging or dropping."""
        return math.prod(self.grid)

    @property
    def is_full_grid(self) -> bool:
        """True while patch rows still are the cells of ``grid`` in raster order."""
        return self.source is None and self.valid is None and self.coords is None

    def prefix_slice(self, name: str) -> slice:
        """Rows of the prefix group ``name``; raises KeyError naming the groups there are."""
        start = 0
        for group, count in self.prefix:
            if group == name:
                return slice(start, start + count)
            start += count
        raise KeyError(f"No prefix tokens called {name!r}; this model has {[g for g, _ in self.prefix]}.")

    def replace(self, **changes: Any) -> TokenLayout:
        """A copy with some fields changed; ``aux`` stays shared so that losses reach the caller."""
        return dataclasses.replace(self, **changes)

    def with_prefix(self, name: str, count: int, first: bool = False) -> TokenLayout:
        """The layout after ``count`` rows called ``name`` joined the prefix (at its end unless ``first``)."""
        group = ((name, count),)
        return self.replace(prefix=group + self.prefix if first else self.prefix + group)

    def require_full_grid(self, who: str) -> tuple[int, ...]:
        """The grid, or a ValueError that says why ``who`` cannot run on these tokens."""
        if not self.is_full_grid:
            raise ValueError(
                f"{who} needs every cell of the {'×'.join(map(str, self.grid))} grid, but tokens were merged, "
                "dropped, packed or padded before it; place it before the token reduction."
            )
        return self.grid

    def coordinates(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """(N, 2) or (B, N, 2) token centres as (row, column) in [0, 1]."""
        if self.coords is not None:
            return self.coords
        h, w = self.grid[-2:]
        rows = (torch.arange(h, device=device, dtype=dtype) + 0.5) / h
        cols = (torch.arange(w, device=device, dtype=dtype) + 0.5) / w
        return torch.cartesian_prod(rows, cols).reshape(-1, 2).repeat(math.prod(self.grid[:-2]), 1)

    def key_mask(self) -> Tensor | None:
        """(B, P+N) bool, True where a row may be a key; None when all may."""
        if self.valid is None:
            return None
        return torch.nn.functional.pad(self.valid, (self.num_prefix, 0), value=True)

    def source_indices(self, batch: int, device: torch.device | None = None) -> Tensor:
        """(B, N_1) row index of every original patch (-1: dropped)."""
        if self.source is not None:
            return self.source
        return torch.arange(self.num_original, device=device).expand(batch, -1)

    def source_map(self, batch: int, num_tokens: int, device: torch.device | None = None) -> Tensor:
        """(B, N, N_1) 0/1 map of rows to original patches; every column of a kept patch has exactly one 1."""
        index = self.source_indices(batch, device)
        hot = torch.nn.functional.one_hot(index.clamp(min=0), num_tokens) * (index >= 0).unsqueeze(-1)
        return hot.transpose(1, 2)

    def regroup(self, assign: Tensor, num_groups: int, valid: Tensor | None = None) -> TokenLayout:
        """The layout after rows were merged or dropped.

        Sizes add up, a group's coordinate is the size-weighted mean, and the source map follows.

        Args:
            assign: (B, N) long, the new row of every current patch row, -1 to drop it.
            num_groups: N', the number of new patch rows.
            valid: (B, N') bool for padded batches.
        """
        batch, num_tokens = assign.shape
        device = assign.device
        keep = (assign >= 0).to(torch.float32)
        to = assign.clamp(min=0)
        sizes = self.sizes if self.sizes is not None else torch.ones(batch, num_tokens, device=device)
        new_sizes = torch.zeros(batch, num_groups, device=device).scatter_add_(1, to, sizes.float() * keep)
        coords = self.coordinates(device)
        if coords.ndim == 2:
            coords = coords.expand(batch, -1, -1)
        weight = (sizes.float() * keep).unsqueeze(-1)
        summed = torch.zeros(batch, num_groups, coords.shape[-1], device=device)
        summed.scatter_add_(1, to.unsqueeze(-1).expand(-1, -1, coords.shape[-1]), coords.float() * weight)
        old = self.source_indices(batch, device)
        source = torch.where(old >= 0, assign.gather(1, old.clamp(min=0)), old)
        return self.replace(
            sizes=new_sizes,
            # a group of size 0 exists only as padding; clamp keeps its coordinate finite
            coords=summed / new_sizes.clamp(min=1e-6).unsqueeze(-1),
            source=source,
            valid=valid if valid is not None else self._regroup_valid(to, keep, num_groups),
            scale_id=None,
        )

    def _regroup_valid(self, to: Tensor, keep: Tensor, num_groups: int) -> Tensor | None:
        if self.valid is None:
            return None
        hits = torch.zeros(to.shape[0], num_groups, device=to.device)
        return hits.scatter_add_(1, to, self.valid.float() * keep) > 0

    def take(self, index: Tensor) -> TokenLayout:
        """The layout after ``x[:, P:]`` was gathered with ``index`` (B, N'): only those rows stay, in that order."""
        batch, kept = index.shape
        num_tokens = self.num_original if self.sizes is None and self.coords is None else self._num_rows()
        assign = torch.full((batch, num_tokens), -1, dtype=torch.long, device=index.device)
        assign.scatter_(1, index, torch.arange(kept, device=index.device).expand(batch, -1))
        return self.regroup(assign, kept)

    def _num_rows(self) -> int:
        for tensor in (self.sizes, self.valid):
            if tensor is not None:
                return tensor.shape[1]
        assert self.coords is not None
        return self.coords.shape[-2]

    def mean(self, patches: Tensor) -> Tensor:
        """Patch rows (B, N, D) → (B, D): a merged row counts for all the patches it stands for, padding for none."""
        if self.sizes is None and self.valid is None:
            return patches.mean(1)
        weight = torch.ones_like(patches[..., 0]) if self.sizes is None else self.sizes.to(patches.dtype)
        if self.valid is not None:
            weight = weight * self.valid
        return (patches * weight.unsqueeze(-1)).sum(1) / weight.sum(1, keepdim=True).clamp(min=1e-6)

    def unmerge(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Give every original patch the value of the row that holds it.

        Args:
            values: (B, N, …) one value per current patch row (no prefix rows).
            fill: value of dropped patches.

        Returns: (B, N_1, …).
        """
        if self.source is None:
            return values
        index = self.source.clamp(min=0)
        shape = index.shape + (1,) * (values.ndim - 2)
        out = values.gather(1, index.reshape(shape).expand(-1, -1, *values.shape[2:]))
        return torch.where((self.source >= 0).reshape(shape), out, torch.full_like(out, fill))

    def to_grid(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """(B, N, …) → (B, …, h, w): un-merge, then lay the patches on their grid."""
        full = self.unmerge(values, fill)
        full = full.movedim(1, -1)
        return full.reshape(*full.shape[:-1], *self.grid)
