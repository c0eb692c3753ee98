"""A scan along the bands of each patch: what follows what in the spectrum, for hyperspectral images."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.vim import Vim
from vitkit.models.spec import PartSpec

# B batch · C bands · N = h·w patches · L = C/bands steps · d narrow width · D width of a token


class SpectralScan(nn.Module):
    """Adds to every token what a selective scan along the bands of its patch found.

    A step of a patch's sequence is one band, or ``bands`` neighbours: ``x_c = K patch_c + e_c`` with one kernel K for
    all steps and a learned e_c for each; ``y_c = x_c + Vim(LN(x))_c`` along the bands in both directions
    (:class:`~vitkit.models.parts.mixers.vim.Vim`); ``token ← token + W LN(mean_c y_c)``. Bands meet, places do not:
    that is the mixers' part. With one band the sequence has one step, and the scan is a function of that band alone,
    in which the decay A has no say.

    The tokenizer that stood in the slot makes the tokens, with its own weights below ``patch_embed.tokenizer``. W
    starts at zero, so the model computes the same at first. Put tokenizers that replace the patch embedding in first:
    ``tokenizer=["conv-stem", "spectral-scan"]``.

    Args:
        bands: neighbouring bands of a step; divides C. Hundreds of narrow bands are scanned faster in tens.
        width: d.
        expand, d_state, d_conv: of the scan.

    Shape: images (B, C, H, W) → tokens (B, N, D), layout.

    Raises: BadInput if ``bands`` does not divide C, an image has other channels, or the tokenizer behind makes other
        tokens than one for each patch.

    Paper: spectral scanning of Vision Mamba in Remote Sensing, arXiv:2505.00630, as in SpectralMamba,
        arXiv:2404.08489.

    Departs from the paper: a survey's mechanism class in its plainest form; kernel, pooling by the mean and the sum
        with the host's own tokens are ours.
    """

    slot = "tokenizer"
    preserves = "exact"
    # with one band there is no past that could decay
    no_gradient = ("scan.ssm.A_log",)

    @classmethod
    def from_standard(
        cls,
        old: nn.Module,
        spec: PartSpec,
        warm: bool = True,
        bands: int = 1,
        width: int = 32,
        expand: float = 1,
        d_state: int = 8,
        d_conv: int = 4,
    ) -> SpectralScan:
        if not warm:
            old = copy.deepcopy(old)
            for module in old.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        return cls(old, spec.dim, spec.patch_size, spec.in_chans, bands, width, expand, d_state, d_conv)

    def __init__(
        self,
        tokenizer: nn.Module,
        dim: int,
        patch_size: tuple[int, int],
        in_chans: int,
        bands: int = 1,
        width: int = 32,
        expand: float = 1,
        d_state: int = 8,
        d_conv: int = 4,
    ) -> None:
        super().__init__()
        if bands < 1 or in_chans % bands or width < 1:
            fits = max(b for b in range(1, max(1, min(bands, in_chans)) + 1) if in_chans % b == 0)
            raise BadInput(
                f"spectral-scan: bands={bands} must divide the {in_chans} channels of the images, and width={width} be "
                f"at least 1; bands={fits} and width=32 would do."
            )
        self.tokenizer, self.bands, self.steps = tokenizer, bands, in_chans // bands
        self.embed = nn.Conv2d(bands, width, patch_size, stride=patch_size, bias=False)
        self.band_embed = nn.Parameter(torch.empty(self.steps, width))
        nn.init.trunc_normal_(self.band_embed, std=0.02)
        self.norm = nn.LayerNorm(width)
        self.scan = Vim(width, "raster", expand, d_state, d_conv, grid=(1, self.steps), num_prefix=0)
        self.norm_out = nn.LayerNorm(width)
        self.proj = nn.Linear(width, dim)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def __getattr__(self, name: str) -> Any:
        # sizes and grids are those of the tokenizer behind, also after they change
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("tokenizer"), name)

    def forward(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        if images.ndim != 4 or images.shape[1] != self.steps * self.bands:
            raise BadInput(
                f"spectral-scan was made for images (B, {self.steps * self.bands}, H, W), and these are "
                f"{'×'.join(map(str, images.shape))}; build the model with in_chans={images.shape[1]}."
            )
        if getattr(self.tokenizer, "slot", None) == "tokenizer":
            x, layout = self.tokenizer(images)
        else:
            grid = tuple(self.tokenizer.dynamic_feat_size(images.shape[-2:]))
            x, layout = self.tokenizer(images), TokenLayout(grid=grid)
            x = x.flatten(1, 2) if x.ndim == 4 else x
        seen, grid = self.spectra(images)
        if layout.grid != grid or not layout.is_full_grid:
            raise BadInput(
                f"spectral-scan needs one token for each of the {grid[0]}×{grid[1]} patches, and "
                f"{type(self.tokenizer).__name__} makes others; put it on a patch embedding or conv-stem."
            )
        return x + self.proj(self.norm_out(seen.mean(2))), layout

    def spectra(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The steps y of every patch behind the scan, (B, N, L, d), and the grid (h, w)."""
        p_h, p_w = self.embed.kernel_size
        # for hosts that fill images up to whole patches; the others have refused by now
        images = F.pad(images, (0, -images.shape[3] % p_w, 0, -images.shape[2] % p_h))
        maps = self.embed(images.unflatten(1, (self.steps, self.bands)).flatten(0, 1))
        grid = (maps.shape[2], maps.shape[3])
        # (B, L, d, N) → (B, N, L, d)
        x = maps.unflatten(0, (-1, self.steps)).flatten(3).permute(0, 3, 1, 2) + self.band_embed
        rows = x.flatten(0, 1)
        update = self.scan(self.norm(rows), TokenLayout(grid=(1, self.steps)))
        return (rows + update).unflatten(0, x.shape[:2]), grid
