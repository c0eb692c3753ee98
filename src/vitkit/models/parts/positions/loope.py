"""Sinusoidal positions along a space-filling curve, with an image-dependent shift of every patch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown
from vitkit.models.constant import Constant
from vitkit.models.layout import TokenLayout
from vitkit.models.scan_order import scan_order, visit_index
from vitkit.models.spec import NeedsFixedGrid, PartSpec

# B batch · P prefix tokens · N = h·w patches · D embedding · C image channels

ORDERS = ("raster", "snake", "hilbert", "gilbert")
# float32 tanh reaches 1 from 9.01 on; the shift must stay below one step of the path
_BELOW_ONE = 1 - 2.0**-23


class LOOPE(nn.Module):
    """One real number per patch, its place on a path through the grid, written in sines and cosines.

    ``X = X_G + X_C``, ``E(X) = [sin(X Wᵀ) | cos(X Wᵀ)]`` with ``W_k = 10000^{−2k/D}``, k = 0 … D/2−1; added to the
    patch tokens in place of the host's table. X_G ∈ {0 … N−1} is the visit number on the path. X_C ∈ (−1, 1)^N comes
    from the image: channels and two coordinate planes in [0, 1] → convolution p×p, stride p → 32 channels →
    convolutions 5×5 to 16, 8, 4 and 1 channels, GELU after each → batch norm → linear N→N → tanh. The linear layer
    starts at zero, so training starts from the plain path. Prefix tokens get a learned vector each.

    Args:
        dim: D, even.
        grid: (h, w), patch cells.
        patch_size: (p_h, p_w) in pixels.
        in_chans: C.
        num_prefix: P, may be 0.
        order: the path: "gilbert" (any h×w), "hilbert", "snake" or "raster"; see
            :func:`vitkit.models.scan_order.scan_order`.
        context: False leaves X_C out: a static code without weights except the prefix's.

    Shape: x (B, P+N, D), images (B, C, H, W) → (B, P+N, D), dtype of x; places and code are computed in float32.
    Raises: BadInput if ``dim`` is odd or the number of prefix tokens differs; UnknownName for another ``order``;
        NeedsFixedGrid if ``context`` is on and the grid is another one than at construction; ValueError on tokens that
        are no full grid.
    Paper: LOOPE: Learnable Optimal Patch Order in Positional Embeddings for Vision Transformers, arXiv:2504.14386.
    Departs from the paper: the activation and the coordinate planes' range are ours. X_C is multiplied by 1 − 2⁻²³,
        so that it stays below 1 where float32 tanh does not. Images whose size is not grid × patch size (a tokenizer
        that pads or overlaps) are resized to it for the shift.
    """

    slot = "position"
    preserves = "none"
    keep_absolute = False
    visit: Tensor

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        patch_size: tuple[int, int],
        in_chans: int = 3,
        num_prefix: int = 1,
        order: str = "gilbert",
        context: bool = True,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise BadInput(f"LOOPE pairs sines with cosines and needs an even token width, not dim={dim}.")
        if order not in ORDERS:
            raise unknown("order of patches", order, ORDERS, "vitkit show loope")
        self.dim, self.grid, self.order = dim, (grid[0], grid[1]), order
        self.num_prefix = num_prefix
        self.register_buffer("visit", visit_index(scan_order(*self.grid, order)), persistent=False)
        # rounded to bfloat16 they would put distant patches in one place
        self.frequency = Constant(frequencies, dim, at_least=torch.float32)
        self.static = None if context else Constant(static_code, *self.grid, order, dim)
        self.prefix = nn.Parameter(torch.empty(1, num_prefix, dim).normal_(std=0.02)) if num_prefix else None
        self.context = PatchShift(self.grid, patch_size, in_chans) if context else None

    @classmethod
    def from_standard(
        cls, old: nn.Module | None, spec: PartSpec, warm: bool = True, order: str = "gilbert", context: bool = True
    ) -> LOOPE:
        """The host's table has no counterpart here, so ``warm`` changes nothing."""
        return cls(spec.dim, spec.grid, spec.patch_size, spec.in_chans, spec.num_prefix, order, context)

    def embed(self, x: Tensor, layout: TokenLayout, images: Tensor | None = None) -> Tensor:
        """Add the code to tokens (B, P+N, D) that carry no positions yet."""
        if layout.num_prefix != self.num_prefix:
            raise BadInput(f"LOOPE was built for {self.num_prefix} prefix tokens and got {layout.num_prefix}.")
        if self.static is not None and tuple(layout.require_full_grid("LOOPE")) == self.grid:
            code = self.static.value.to(x.dtype)
        else:
            code = self.code(self.places(layout, images)).to(x.dtype)
        if self.prefix is not None:
            code = torch.cat([self.prefix.to(x.dtype).expand(code.shape[0], -1, -1), code], dim=1)
        return x + code

    def places(self, layout: TokenLayout, images: Tensor | None = None) -> Tensor:
        """X, (B, N) with the shift of the image, (1, N) without; float32."""
        grid = layout.require_full_grid("LOOPE")
        if self.context is None:
            visit = self.visit if tuple(grid) == self.grid else self._visit_of(grid)
            return visit.to(torch.float32)[None]
        if tuple(grid) != self.grid:
            raise NeedsFixedGrid(
                f"LOOPE learns its shifts for {self.grid[0]}×{self.grid[1]} patches and got a grid of "
                f"{'×'.join(map(str, grid))}; resize the images, or use context=False."
            )
        if images is None:
            raise BadInput("LOOPE computes its shifts from the images; pass them to embed, or use context=False.")
        return self.visit.to(torch.float32) + self.context(images)

    def code(self, places: Tensor) -> Tensor:
        """E(X): places (B, N) → (B, N, D), float32."""
        return sinusoid(places, self.frequency.value.to(torch.float32))

    @torch.no_grad()
    def table(self) -> Tensor:
        """The static code, E(X_G), as (h, w, D): what :func:`vitkit.models.diagnostics.pesi.pesi` takes."""
        return self.code(self.visit.to(torch.float32)[None])[0].unflatten(0, self.grid)

    def _visit_of(self, grid: tuple[int, ...]) -> Tensor:
        if len(grid) != 2:
            raise NeedsFixedGrid(f"LOOPE orders the cells of a plane; the grid {grid} has {len(grid)} axes.")
        return visit_index(scan_order(grid[0], grid[1], self.order)).to(self.visit.device)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, order={self.order!r}"


def frequencies(dim: int) -> Tensor:
    """W_k = 10000^{−2k/D} of k = 0 … D/2−1, float64."""
    return 10000.0 ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)


def sinusoid(places: Tensor, frequency: Tensor) -> Tensor:
    """``[sin(X Wᵀ) | cos(X Wᵀ)]``: places (…, N) and frequencies (D/2,) → (…, N, D)."""
    angle = places[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def static_code(h: int, w: int, order: str, dim: int) -> Tensor:
    """E(X_G) of an h×w grid, (1, N, D); in float32, to equal the code of an image without a shift to the last bit."""
    visit = visit_index(scan_order(h, w, order)).to(torch.float32)
    return sinusoid(visit, frequencies(dim).to(torch.float32))[None]


def coordinate_planes(h: int, w: int) -> Tensor:
    """Column and row of every pixel in [0, 1], (1, 2, h, w) float64."""
    rows = torch.linspace(0, 1, h, dtype=torch.float64)[:, None].expand(h, w)
    cols = torch.linspace(0, 1, w, dtype=torch.float64)[None].expand(h, w)
    return torch.stack([cols, rows])[None]


class PatchShift(nn.Module):
    """X_C of :class:`LOOPE`: images (B, C, H, W) → one shift in (−1, 1) per patch, (B, N), float32.

    Args:
        grid: (h, w).
        patch_size: (p_h, p_w) in pixels.
        in_chans: C.
        channels: of the convolutions.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        patch_size: tuple[int, int],
        in_chans: int,
        channels: tuple[int, ...] = (32, 16, 8, 4, 1),
    ) -> None:
        super().__init__()
        self.size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
        self.planes = Constant(coordinate_planes, *self.size)
        layers: list[nn.Module] = [nn.Conv2d(in_chans + 2, channels[0], patch_size, stride=patch_size), nn.GELU()]
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 5, padding=2), nn.GELU()]
        self.features = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(channels[-1])
        num_patches = grid[0] * grid[1]
        self.to_shift = nn.Linear(num_patches * channels[-1], num_patches)
        nn.init.zeros_(self.to_shift.weight)
        nn.init.zeros_(self.to_shift.bias)

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != self.size:
            # in float32: bilinear resizing of bfloat16 is not available everywhere
            images = F.interpolate(images.float(), size=self.size, mode="bilinear").to(images.dtype)
        planes = self.planes.value
        pixels = torch.cat([images.to(planes.dtype), planes.expand(images.shape[0], -1, -1, -1)], dim=1)
        hidden = self.norm(self.features(pixels))
        return self.to_shift(hidden.flatten(1)).float().tanh() * _BELOW_ONE
