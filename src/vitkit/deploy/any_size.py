"""A network that takes images of other sizes than it was built for, in a form that exporters can follow."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from vitkit.anatomy.host import find_host
from vitkit.deploy.resampling import cubic, resampling_weights
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout

# what the side of an image must be a multiple of where nothing says so
_USUAL_STRIDE = 32


def any_size(model: nn.Module) -> tuple[nn.Module, int]:
    """A copy of a model for images of any height and width, and what both must be multiples of.

    A plain ViT's table of positions is resized as timm does (bicubic, antialiased), by matrix products inside the
    graph. Other networks stay as they are; whether their graph depends on the size is for the exporter to find out.

    Raises: BadInput if the ViT's tokenizer or positions are made for one size.
    """
    vit = find_host(model)
    if vit is None:
        return model, _USUAL_STRIDE
    tokenizer = vit.patch_embed
    if getattr(tokenizer, "pick_positions", None) is _resized:
        return model, math.lcm(*tokenizer.patch_size)
    if getattr(tokenizer, "slot", None) == "tokenizer" or hasattr(tokenizer, "pick_positions"):
        raise BadInput(f"{type(tokenizer).__name__} makes its tokens for one image size; deploy without free_size.")
    if vit.position is not None:
        raise BadInput(f"{type(vit.position).__name__} places tokens for one image size; deploy without free_size.")
    new = deepcopy(model)
    vit = find_host(new)
    assert vit is not None
    vit.patch_embed.strict_img_size = False
    vit.patch_embed.pick_positions = _resized
    return new, math.lcm(*vit.patch_embed.patch_size)


def _resized(table: Tensor, old_grid: tuple[int, int], layout: TokenLayout) -> Tensor:
    """Rows (1, N, D) of the tokens of this image, out of the table (1, h·w, D) of the old grid."""
    weights = []
    for old_side, side in zip(old_grid, layout.grid):
        old, new = (torch.arange(n, device=table.device).float() for n in (old_side, side))
        step = old_side / (new[-1:] + 1)
        weights.append(resampling_weights(old, new, step, cubic))
    rows, columns = weights
    # (h, w, D) → (H, w, D) → (H, W, D)
    grid = (rows @ table.float().reshape(old_grid[0], -1)).unflatten(1, (old_grid[1], -1))
    return (columns @ grid).flatten(0, 1).unsqueeze(0).to(table.dtype)
