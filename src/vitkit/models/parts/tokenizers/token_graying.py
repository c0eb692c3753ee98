"""Token Graying: compress the spectrum of the input tokens, so that attention is better conditioned."""

from __future__ import annotations

from typing import Literal

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.models.constant import Constant
from vitkit.models.dct import dct_matrix, dct_rows
from vitkit.models.layout import TokenLayout
from vitkit.models.rehost import adopt
from vitkit.models.spec import PartSpec

# keeps the gradient of |y|^ε finite at zero coefficients; relative to the largest one
TAU = 1e-6


class TokenGraying(PatchEmbed):
    """The host's patch embedding with the spectrum of its token matrix compressed.

    For the matrix X (N positions × K features) of an image, before the linear patch embedding:

    - ``mode="dct"``: ``Y = D_N X D_Kᵀ`` (orthonormal DCT-II on both axes), ``m = max|Y|``,
      ``Ỹ = Y ⊙ ((|Y| + τm) / (m + τm))^(ε−1)``, ``X̃ = D_Nᵀ Ỹ D_K``: sign(Y)·m·(|Y|/m)^ε, smooth at 0.
    - ``mode="svd"``: ``X = U Σ Vᵀ``, ``Σ̃ = σ_max (Σ/σ_max)^ε``, ``X̃ = U Σ̃ Vᵀ``; the reference, slow. The gradient
      treats the spectrum as constant, since the derivative of singular vectors is unbounded where values coincide.

    ε = 1 is the identity in both. There are no parameters of its own; the weights keep their names below
    ``patch_embed.proj``.

    Args:
        mode: "dct" or "svd".
        eps: ε in (0, 1]; smaller is greyer. Default 0.95 (the paper's, for "dct"; it uses 0.6–0.7 for "svd").
        place: "patches" (before the projection, the paper's place) or "embed" (after it).

    Shape: images (B, C, H, W) → tokens (B, N, D), layout.

    Raises: ValueError for an unknown mode or place, ε outside (0, 1], another tokenizer than a plain patch embedding
        in the slot, or images with other channels or no whole number of patches.

    Paper: Always Skip Attention, arXiv:2505.01996.

    Departs from the paper: the factor σ_max (or m) puts the scale back, and τ keeps gradients finite; both are ours,
    as no official code was found.
    """

    slot = "tokenizer"
    preserves = "approx"

    mode: str
    eps: float
    place: str
    rows: Constant | None
    cols: Constant | None

    @classmethod
    def from_standard(
        cls,
        old: nn.Module,
        spec: PartSpec,
        warm: bool = True,
        mode: Literal["dct", "svd"] = "dct",
        eps: float = 0.95,
        place: Literal["patches", "embed"] = "patches",
    ) -> TokenGraying:
        if mode not in ("dct", "svd"):
            raise ValueError(f"mode={mode!r} is not known; use 'dct' or 'svd'.")
        if place not in ("patches", "embed"):
            raise ValueError(f"place={place!r} is not known; use 'patches' or 'embed'.")
        if not 0 < eps <= 1:
            raise ValueError(f"eps={eps} must lie in (0, 1]; 1 leaves the tokens as they are, 0.95 is usual.")
        if not isinstance(old, PatchEmbed):
            raise ValueError(
                f"Token Graying wraps a plain patch embedding, but the tokenizer is {type(old).__name__}; "
                "put it in first."
            )
        new = adopt(cls, old)
        new.mode, new.eps, new.place = mode, float(eps), place
        new.rows = new.cols = None
        if mode == "dct":
            width = spec.dim if place == "embed" else old.proj.weight[0].numel()
            new.rows = Constant(dct_rows, spec.num_patches, at_least=torch.float32)
            new.cols = Constant(dct_rows, width, at_least=torch.float32)
        if not warm:
            conv = old.proj
            size = (int(old.patch_size[0]), int(old.patch_size[1]))
            new.proj = nn.Conv2d(conv.in_channels, conv.out_channels, size, size, bias=conv.bias is not None)
        return new

    def forward(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        grid = self.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        patches, grid = self._patches(images), (int(grid[0]), int(grid[1]))
        if self.place == "patches":
            patches = self._gray(patches)
        weight = self.proj.weight.flatten(1)
        tokens = self.norm(F.linear(patches, weight, self.proj.bias))
        if self.place == "embed":
            tokens = self._gray(tokens)
        return tokens, TokenLayout(grid=grid)

    def _gray(self, tokens: Tensor) -> Tensor:
        if self.rows is None or self.cols is None:
            return gray(tokens, self.eps, self.mode)
        # images of another size have another number of positions
        rows = self.rows.value if tokens.shape[-2] == len(self.rows.value) else None
        return gray(tokens, self.eps, self.mode, rows, self.cols.value)

    def _patches(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → (B, N, C·p_h·p_w) in the order of the projection's weights."""
        h, w = self.patch_size
        if images.ndim != 4 or images.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"Token Graying was built for images (B, {self.proj.in_channels}, H, W) and got {tuple(images.shape)}."
            )
        if self.dynamic_img_pad:
            images = F.pad(images, (0, -images.shape[-1] % w, 0, -images.shape[-2] % h))
        elif images.shape[-2] % h or images.shape[-1] % w:
            raise ValueError(
                f"Images of {images.shape[-2]}×{images.shape[-1]} pixels cannot be cut into {h}×{w} patches; resize "
                f"them to {images.shape[-2] // h * h}×{images.shape[-1] // w * w}."
            )
        cut = images.unflatten(-1, (-1, w)).unflatten(-3, (-1, h))
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def gray(
    tokens: Tensor, eps: float, mode: str = "dct", rows: Tensor | None = None, cols: Tensor | None = None
) -> Tensor:
    """Compress the spectrum of token matrices (B, N, K); computed in float32 or wider, returned in the input's dtype.

    Args:
        tokens: (B, N, K).
        eps: exponent ε.
        mode: "dct" or "svd".
        rows, cols: the DCT matrices (N, N) and (K, K), where they are at hand.
    """
    if eps == 1:
        return tokens
    work = tokens if tokens.dtype == torch.float64 else tokens.float()
    with torch.autocast(tokens.device.type, enabled=False):
        if mode == "svd":
            return _gray_svd(work, eps).to(tokens.dtype)
        rows = dct_matrix(work.shape[-2], work.dtype, work.device) if rows is None else rows.to(work.dtype)
        cols = dct_matrix(work.shape[-1], work.dtype, work.device) if cols is None else cols.to(work.dtype)
        return _gray_dct(work, eps, rows, cols).to(tokens.dtype)


def _gray_dct(x: Tensor, eps: float, rows: Tensor, cols: Tensor) -> Tensor:
    y = rows @ x @ cols.T
    size = y.abs()
    # an all-zero image has no largest coefficient; any positive one keeps it at zero
    top = size.amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
    y = y * ((size + TAU * top) / (top + TAU * top)).pow(eps - 1)
    return rows.T @ y @ cols


def _gray_svd(x: Tensor, eps: float) -> Tensor:
    with torch.no_grad():
        _, sigma, vt = torch.linalg.svd(x, full_matrices=False)
        top = sigma[..., :1].clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
        ratio = sigma / top
        # directions that are zero up to rounding stay zero
        factor = torch.where(ratio > torch.finfo(x.dtype).eps, ratio.clamp(min=1e-30).pow(eps - 1), 0.0)
        mix = (vt.transpose(-2, -1) * factor.unsqueeze(-2)) @ vt
    return x @ mix
