"""Rotary positions: queries and keys are turned by their places, so that attention sees relative positions.

timm's rotary modules (axial, mixed, DINOv3, M-RoPE) give frequencies and tables. What is added is that a table follows
the tokens: after merging, dropping or permuting, every token is turned by the place it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout

# B batch · H heads · P prefix tokens · N patch tokens · d head dim

# timm's classes by name, since not every version has all of them
AXIAL, DINOV3, MIXED, MROPE = ROPES = (
    "RotaryEmbeddingCat",
    "RotaryEmbeddingDinoV3",
    "RotaryEmbeddingMixed",
    "RotaryEmbeddingMRope",
)


class Rotary(nn.Module):
    """Turns the patch rows of q and k by ``R(θ_n)``: channel pairs rotate by the angles of the token's place n.

    ``⟨R(θ_m) q, R(θ_n) k⟩`` depends on ``θ_m − θ_n`` only. Angles are affine in row and column, so a merged token,
    whose coordinate is the size-weighted mean of its patches, gets the size-weighted mean of their angles. Prefix rows
    are not turned. The angles come with the layout (:class:`RotaryTable`), made once per forward by a host with a
    ``rope``; there are no parameters here.

    Args:
        dim: channels per head that are turned.
        rotate_half: channel i rotates with channel i + d/2 (True) or 2i with 2i + 1 (False).
        depth: index of the block, for tables that differ between blocks.

    Shape: q, k (B, H, P+N, d) → the same.

    Raises: BadInput if the layout has no tables, or tables of other sizes than q.

    Paper: Heo et al., Rotary Position Embedding for Vision Transformer, arXiv:2403.13298; EVA-02, arXiv:2303.11331;
    DINOv3, arXiv:2508.10104.
    Departs from the papers: nothing on a full grid; tables that follow merged tokens are ours.
    """

    slot = "position"
    per_block = True
    depth_index: int | None

    def __init__(self, dim: int, rotate_half: bool = False, depth: int | None = None) -> None:
        super().__init__()
        self.dim, self.rotate_half, self.depth_index = dim, rotate_half, depth

    def rotate(self, q: Tensor, k: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        if not isinstance(layout.rotation, RotaryTable):
            raise BadInput(
                f"Block {self.depth_index} turns queries and keys by rotary tables, and this layout has none; take the "
                "layout that vit.embed(images) returns."
            )
        # a caller of single blocks may hand over a layout whose rows moved since the tables were made
        rotation, depth, prefix = layout.rotation.at(layout), self.depth_index or 0, layout.num_prefix
        as_complex = self._by_complex_numbers(q, rotation.dtype)
        table = rotation.turns_of_block(depth) if as_complex else rotation.of_block(depth)
        channels = table.shape[-1] * 2 if as_complex else table.shape[-1] // 2
        if channels != q.shape[-1]:
            raise BadInput(
                f"The rotary tables turn {channels} channels per head and block {self.depth_index} has "
                f"{q.shape[-1]}; keep the width of the heads, or put another rotating part into the slot."
            )
        table = _padded(table, q.shape[-2] - prefix, layout)

        def turned(x: Tensor) -> Tensor:
            rows = x[:, :, prefix:]
            if as_complex:
                patches = _complex_turn(rows, table)
            else:
                patches = apply_rot_embed_cat(rows, table, half=self.rotate_half).to(x.dtype)
            return torch.cat([x[:, :, :prefix], patches], dim=2) if prefix else patches

        return turned(q), turned(k)

    def _by_complex_numbers(self, q: Tensor, dtype: torch.dtype) -> bool:
        # compilers and exporters know none, and fuse what is slow without
        known = not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        return known and not self.rotate_half and q.dtype == dtype and q.dtype in (torch.float32, torch.float64)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, rotate_half={self.rotate_half}"


@dataclass(frozen=True, eq=False)
class RotaryTable:
    """Sines and cosines of the patch rows that one layout describes; travels in ``layout.rotation``.

    Args:
        rope: timm's rotary module.
        grid: cells of the layout the table was made for.
        coords: its coordinates; a layout with others has moved rows.
        warp: (scale, shift), (2,) each: the coordinate augmentation drawn for this forward; None: none.
        table: (N, 2d) or (B, 1, N, 2d), sines then cosines. For tables that differ between blocks the places
            (N, 2) or (B, 1, N, 2) from which each block computes its own.
    """

    rope: nn.Module
    grid: tuple[int, ...]
    coords: Tensor | None
    warp: tuple[Tensor, Tensor] | None
    table: Tensor

    @classmethod
    def start(cls, rope: nn.Module, layout: TokenLayout) -> RotaryTable:
        """For the tokens that enter the first block; in training, draws the augmentation that ``rope`` asks for."""
        if _kind(rope) not in ROPES:
            raise BadInput(f"{_kind(rope)} is no rotary embedding that is known here; known are {', '.join(ROPES)}.")
        warp = draw_warp(rope) if rope.training and getattr(rope, "aug_active", False) else None
        return cls(rope, layout.grid, layout.coords, warp, _table(rope, layout, warp))

    def at(self, layout: TokenLayout) -> RotaryTable:
        """The table for the rows of ``layout``: this one, unless rows have moved."""
        if layout.coords is self.coords and layout.grid == self.grid:
            return self
        return RotaryTable(self.rope, layout.grid, layout.coords, self.warp, _table(self.rope, layout, self.warp))

    def follow(self, layout: TokenLayout) -> TokenLayout:
        now = self.at(layout)
        return layout if now is self else layout.replace(rotation=now)

    @property
    def dtype(self) -> torch.dtype:
        """Of the tables of blocks."""
        return self._mixed(0).dtype if _kind(self.rope) == MIXED else self.table.dtype

    def of_block(self, depth: int) -> Tensor:
        """(N, 2d), (H, N, 2d) or (B, 1 or H, N, 2d) of block ``depth``."""
        if _kind(self.rope) != MIXED:
            return self.table
        freqs = self._mixed(depth)
        angles = _mixed_angles(freqs, self.table)
        # timm's get_mixed_freqs with fewer copies
        both = torch.stack([angles.sin(), angles.cos()], dim=-2)
        return both.repeat_interleave(2, dim=-1).flatten(-2).to(freqs.dtype)

    def turns_of_block(self, depth: int) -> Tensor:
        """The same as complex numbers exp(iθ), (…, N, d/2), for pairs of neighbouring channels."""
        if _kind(self.rope) == MIXED:
            freqs = self._mixed(depth)
            angles = _mixed_angles(freqs, self.table)
            return torch.polar(torch.ones_like(angles), angles).to(freqs.dtype.to_complex())
        sin, cos = self.table[..., ::2].chunk(2, dim=-1)
        return torch.complex(cos, sin)

    def _mixed(self, depth: int) -> Tensor:
        freqs: Tensor = self.rope.freqs[:, depth]  # type: ignore[index]
        # an augmented table is not rounded to the parameters' half precision, as in timm
        return freqs if self.warp is None else freqs.to(torch.promote_types(freqs.dtype, torch.float32))


def _complex_turn(x: Tensor, turns: Tensor) -> Tensor:
    """(B, H, N, d) times (…, N, d/2): one complex product in place of five real passes."""
    # a pair must lie together, at an even place
    in_pairs = x.stride(-1) == 1 and all(n % 2 == 0 for n in (x.storage_offset(), *x.stride()[:-1]))
    pairs = (x if in_pairs else x.contiguous()).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2)


def _mixed_angles(freqs: Tensor, places: Tensor) -> Tensor:
    """Radians (H, N, d/2) or (B, H, N, d/2) in float32, of freqs (2, H, d/2), column and row, at places (…, N, 2)."""
    first, second = (places[..., i, None].float() * freqs[i].float().unsqueeze(-2) for i in (0, 1))
    return first + second


def draw_warp(rope: Any) -> tuple[Tensor, Tensor]:
    """One random affine map of the places, ``x ← scale·x + shift`` per axis, as ``rope`` was told to augment.

    shift ~ U(−s, s) per axis, jitter log-uniform in [1/J, J] per axis, rescale log-uniform in [1/R, R] shared, in this
    order, so that a seed gives what it gives in timm.
    """
    device = torch.device("cpu") if _kind(rope) == DINOV3 else _frequencies(rope).device
    scale, shift = torch.ones(2, device=device), torch.zeros(2, device=device)
    if rope.shift_coords is not None:
        shift = torch.empty(2, device=device).uniform_(-rope.shift_coords, rope.shift_coords)
    for factor, count in ((rope.jitter_coords, 2), (rope.rescale_coords, 1)):
        if factor is not None:
            scale = scale * torch.empty(count, device=device).uniform_(-math.log(factor), math.log(factor)).exp()
    return scale, scale * shift


def _table(rope: Any, layout: TokenLayout, warp: tuple[Tensor, Tensor] | None) -> Tensor:
    if _kind(rope) != MIXED and warp is None and layout.coords is None and len(layout.grid) == 2:
        own = getattr(rope, "feat_shape", None)
        if own is None:
            return rope.get_embed(shape=list(layout.grid))
        if tuple(own) == layout.grid:
            return rope.get_embed()
    places = _places(rope, layout)
    if warp is not None:
        scale, shift = (t.to(places.device) for t in warp)
        places = places * scale + shift
    if places.ndim == 3:
        places = places.unsqueeze(1)
    if _kind(rope) == MIXED:
        return places
    angles = _angles(rope, places)
    half = _kind(rope) == MROPE or getattr(rope, "rotate_half", False)
    angles = torch.cat([angles, angles], dim=-1) if half else angles.repeat_interleave(2, dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _places(rope: Any, layout: TokenLayout) -> Tensor:
    """(N, 2) or (B, N, 2) token places in the units and the axis order of ``rope``."""
    device = _frequencies(rope).device
    grid = layout.grid[-2:]
    if layout.coords is None:
        # whole numbers, not rounded fractions
        cells = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
    else:
        coords = layout.coords.to(device, torch.float32)
        cells = [coords[..., i] * n - 0.5 for i, n in enumerate(grid)]
    reference = getattr(rope, "ref_feat_shape", None) or (None, None)
    axes = [_axis(rope, cells[i], i, grid, reference[i]) for i in (0, 1)]
    if layout.coords is None:
        axes = list(torch.meshgrid(*axes, indexing="ij"))
    places = torch.stack(axes[::-1] if rope.grid_indexing == "xy" else axes, dim=-1)
    if layout.coords is not None:
        return places
    images = math.prod(layout.grid[:-2])
    # repeat copies, even once
    return places.reshape(-1, 2) if images == 1 else places.reshape(-1, 2).repeat(images, 1)


def _axis(rope: Any, cell: Tensor, axis: int, grid: Sequence[int], reference: int | None) -> Tensor:
    """Cell numbers along one axis → what ``rope`` calls their position."""
    default = "pixel" if getattr(rope, "in_pixels", False) else "centered" if _kind(rope) == DINOV3 else "index"
    kind = getattr(rope, "grid_type", default)
    offset, size = getattr(rope, "grid_offset", 0.0), grid[axis]
    if kind == "pixel":
        place = 2 * cell / max(size - 1, 1) - 1
    elif kind == "centered":
        over = {"separate": size, "min": min(grid), "max": max(grid)}[rope.normalize_coords]
        place = (cell + 0.5 + offset) / over
    else:
        place = cell + offset if offset else cell
    if reference is not None:
        place = place / size * reference
    return 2 * place - 1 if kind == "centered" else place


def _angles(rope: Any, places: Tensor) -> Tensor:
    """(…, N, 2) places → (…, N, d/2) angles in radians."""
    if _kind(rope) == DINOV3:
        return (2 * math.pi * places.unsqueeze(-1) / rope.periods).flatten(-2)
    if _kind(rope) == MROPE:
        # the first of three axes is time, where an image stands at 0
        return torch.cat([torch.zeros_like(places[..., :1]), places], dim=-1)[..., rope.axis] * rope.inv_freq
    return (places.unsqueeze(-1) * rope.bands).flatten(-2)


def _frequencies(rope: Any) -> Tensor:
    return getattr(rope, {AXIAL: "bands", DINOV3: "periods", MIXED: "freqs", MROPE: "inv_freq"}[_kind(rope)])


def _kind(rope: object) -> str:
    return type(rope).__name__


def _padded(table: Tensor, rows: int, layout: TokenLayout) -> Tensor:
    """Rows that only pad a batch have no place; they are left unturned, and nobody looks at them."""
    missing = rows - table.shape[-2]
    if not missing:
        return table
    if layout.valid is None or layout.valid.shape[1] != rows or missing < 0:
        raise BadInput(
            f"The layout describes {table.shape[-2]} patch tokens and x has {rows}; change tokens and layout together, "
            "with layout.regroup or layout.take."
        )
    unturned = table.new_ones(*table.shape[:-2], missing, table.shape[-1])
    if not table.is_complex():
        unturned[..., : table.shape[-1] // 2] = 0.0
    return torch.cat([table, unturned], dim=-2)
