"""From images to points of the Lorentz model, and where on the image they are."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.lorentz.layers import LorentzLinear
from vitkit.models.lorentz.manifold import Curved, lift

# B batch · C channels · p side of a patch · N patches · D coordinates of a token, time first


class LorentzPatchEmbed(nn.Module):
    """Pixels become points, a patch of them one point, which a Lorentz linear layer maps to a token.

    The points of a p×p window are joined as ``[√(Σ_i t_i² − (p² − 1)c); all space parts]``. As
    ``t_i² = ‖pixel_i‖² + c``, that is the lift of the flat patch, and computed so.

    Args:
        patch_size: p. in_chans: C. features: D.

    Shape: images (B, C, H, W), c → (B, N, D), rows first.
    Raises: BadInput if a side of the images is no multiple of p.
    Paper: HyperCore, arXiv:2504.08912.
    """

    def __init__(self, patch_size: int, in_chans: int, features: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = LorentzLinear(1 + in_chans * patch_size**2, features)

    def forward(self, images: Tensor, c: Curved) -> Tensor:
        side = self.patch_size
        if any(length % side for length in images.shape[-2:]):
            raise BadInput(
                f"Images of {images.shape[-2]}×{images.shape[-1]} pixels do not divide into patches of {side}; "
                "resize them or give another patch_size."
            )
        patches = F.pixel_unshuffle(images, side).flatten(2).transpose(1, 2)
        return self.proj(lift(patches, c), c)


class LorentzPositions(nn.Module):
    """One learned point for every place of a grid.

    The points live on the sheet of curvature −1 and are moved to −1/c when they are used, so that a learned c moves no
    parameter. They are lifted from their space part at every use: an optimizer that knows nothing of the sheet may
    write what it likes into them. One that does
    (:class:`~vitkit.train.optimizers.riemannian_adam.RiemannianAdam`) recognises them by the attribute ``lorentz_c`` of
    the parameter, which copies of the module keep.

    Args:
        grid: (h, w), or a side. features: D.

    Shape: c → (1, h·w, D).
    Paper: HyperCore, arXiv:2504.08912; random points at distance 1 from the origin, as its code draws them.
    """

    def __init__(self, grid: int | tuple[int, int], features: int) -> None:
        super().__init__()
        height, width = to_2tuple(grid)
        space = F.normalize(torch.randn(1, height * width, features - 1), dim=-1)
        self.pos_embed = nn.Parameter(lift(math.sinh(1) * space, 1.0))
        self._mark()

    def forward(self, c: Curved) -> Tensor:
        return lift(self.pos_embed[..., 1:], 1.0) * c**0.5

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def _mark(self) -> None:
        self.pos_embed.lorentz_c = 1.0  # type: ignore[attr-defined]

    # a copied or replaced Parameter forgets its attributes

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mark()

    def _apply(self, *args: Any, **kwargs: Any) -> LorentzPositions:
        super()._apply(*args, **kwargs)
        self._mark()
        return self
