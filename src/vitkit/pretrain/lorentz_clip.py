"""L-CLIP: two encoders of points, trained so that what belongs together is near."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.lorentz.layers import LorentzLinear
from vitkit.models.lorentz.manifold import Curvature, Curved, lift, pairwise_distance

# B pairs · D₁, D₂ coordinates of the encoders' points, time first · E of the common space

_MOST = math.log(100)


class LorentzCLIP(nn.Module):
    """``½[CE(−τ·d(x_i, y_j)) + CE(−τ·d(y_i, x_j))]``: the similarity of two points is minus their Lorentz distance d.

    Both encoders' points go through a Lorentz linear layer each into one space, where (as in the authors' code) their
    space parts get length one. τ is learned, at most 100.

    >>> import timm, torch, vitkit
    >>> image, text = (timm.create_model("lvit_femto", num_classes=0, depth=1) for _ in range(2))
    >>> clip = LorentzCLIP(image, text, features=(68, 68), embed_dim=17)
    >>> sorted(clip({"images": torch.rand(4, 3, 32, 32), "texts": torch.rand(4, 3, 32, 32)}))
    ['logs', 'loss', 'output']

    Args:
        first, second: modules that turn an entry of the batch into points (B, D₁) and (B, D₂) of the Lorentz model of
            curvature −1/c, such as ``timm.create_model("lvit_tiny", num_classes=0)``; the same module twice for two
            views of images.
        features: D₁ and D₂, time coordinate included.
        embed_dim: E, likewise.
        curvature: c, that of the encoders.
        temperature: 1/τ at the start.
        normalize: space parts of length one.
        keys: names of the two entries of the batch.

    Shape: batch {first key: (B, …), second key: (B, …)} → {"loss": (), "output": similarities −d (B, B), "logs"}.
    Raises: BadInput if the batch lacks an entry, the two differ in length, or the temperature is not positive.
    Paper: HyperCore, arXiv:2504.08912.
    Departs from the paper: its code can add MERU's entailment loss, with weight 0 by default; it is left out. Negatives
        come from this process's batch alone.
    """

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        features: tuple[int, int],
        embed_dim: int = 513,
        curvature: float = 1.0,
        temperature: float = 0.07,
        normalize: bool = True,
        keys: tuple[str, str] = ("images", "texts"),
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise BadInput(f"temperature={temperature} must be positive; CLIP starts at 0.07.")
        self.first, self.second, self.keys, self.normalize = first, second, keys, normalize
        self.curvature = Curvature(curvature)
        self.first_proj = LorentzLinear(features[0], embed_dim)
        self.second_proj = LorentzLinear(features[1], embed_dim)
        for proj, width in ((self.first_proj, features[0]), (self.second_proj, features[1])):
            nn.init.normal_(proj.linear.weight, std=width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def encode(self, inputs: Tensor, which: int = 0) -> Tensor:
        """Points (B, E) of the common space, from the first (0) or the second (1) encoder."""
        encoder, proj = (self.second, self.second_proj) if which else (self.first, self.first_proj)
        return self._common(encoder(inputs), proj, self.curvature())

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        missing = [key for key in self.keys if key not in batch]
        if missing:
            raise BadInput(
                f"The batch has {sorted(batch)} but not {missing[0]!r}; L-CLIP reads {' and '.join(self.keys)}."
            )
        x, y = (self.encode(batch[key], i) for i, key in enumerate(self.keys))
        if len(x) != len(y):
            raise BadInput(f"{len(x)} {self.keys[0]} and {len(y)} {self.keys[1]} are no pairs; give equally many.")
        similarity = -pairwise_distance(x, y, self.curvature())
        scale = self.logit_scale.float().clamp(max=_MOST).exp()
        target = torch.arange(len(x), device=x.device)
        loss = 0.5 * (F.cross_entropy(scale * similarity, target) + F.cross_entropy(scale * similarity.t(), target))
        hits = (similarity.argmax(1) == target).float().mean()
        return {"loss": loss, "output": similarity, "logs": {"scale": scale.detach(), "retrieval": hits.detach()}}

    def _common(self, x: Tensor, proj: LorentzLinear, c: Curved) -> Tensor:
        x = proj(x, c)
        return lift(F.normalize(x[..., 1:], dim=-1), c) if self.normalize else x

    def no_weight_decay(self) -> set[str]:
        return {"logit_scale"}
