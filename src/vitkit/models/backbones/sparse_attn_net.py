"""SparseAttnNet: attention over the few pixels of an image that a small convolutional net picks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import Backbone, cfg, create
from vitkit.models.layout import TokenLayout
from vitkit.models.pixel_selection import PixelBudget, PixelSelector, Selection, distillation
from vitkit.models.vit import Attention, Block, Mlp

__all__ = ["SparseAttnNet"]

# B images · k chosen pixels · D width · H heads


class State(NamedTuple):
    """What walks through the layers.

    Attributes:
        x: (B, 1+k, D), class token first. chosen: the pixels. weights: (B, k) attention of the class token in the last
            layer so far, mean over heads, None before the first.
        aux: auxiliary losses, written as ``aux[name, depth]``.
    """

    x: Tensor
    chosen: Selection
    weights: Tensor | None
    aux: dict[tuple[str, int], Tensor]


class FineAttention(Block):
    """The host's pre-norm block on the chosen pixels, which also says what its class token attends to."""

    def forward(self, state: State) -> State:  # type: ignore[override]
        x, attn = state.x, self.attn
        layout = _layout(state)
        normed = self.norm1(x)
        q, k, v = attn.heads(normed)
        x = x + self.drop_path1(self.ls1(attn.attend(q, k, v, normed, layout)))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), layout)))
        # one row of the weights: the rest stays in the fused kernel
        row = ((q[:, :, :1] * attn.scale) @ k.transpose(-2, -1)).float().softmax(-1)
        return state._replace(x=x, weights=row.mean(1)[:, 0, 1:])


class SparseAttnNet(Backbone):
    """Coarse to fine: a cheap net scores all pixels, attention classifies from the k best.

    - Coarse: F (H×W) by :class:`~vitkit.models.pixel_selection.PixelScorer`, ``A = σ(F)``.
    - The k pixels of largest A, of equal ones the first in raster order; in training a share ε of them is drawn at
      random instead, with probabilities proportional to A.
    - Fine: ``e_i = A_i·MLP(row_i, column_i, value_i)``; pre-norm attention layers with an MLP over
      [class, e_1 … e_k]; the class token is read. Tokens know their places only through e_i, so their order does not
      matter.
    - The scorer learns in two ways: through the gates A_i, and in training from the auxiliary loss
      ``λ·KL(w ‖ softmax F at the k pixels)``, w the class token's attention in the last layer, mean over heads,
      renormalised over the pixels, without gradient.
    - k follows the training loss, see :class:`~vitkit.models.pixel_selection.PixelBudget`: fewer pixels while it falls,
      more when it does not, frozen in the last quarter. ``budget.count`` is k.

    Args:
        img_size: H, W of the images that the shares count; others run with k scaled.
        in_chans: C: colours, one phase, or the windows of an event camera; values as they come.
        num_classes, drop_rate, global_pool ("token" or ""): as in timm.
        embed_dim: D. depth: attention layers. num_heads: H. mlp_ratio: hidden width over D.
        share: k at the start over H·W. least, most: its bounds.
        adaptive: False keeps k.
        every: epochs between comparisons of the training loss.
        tolerance: τ, relative improvement that makes k smaller.
        explore: ε.
        distill: λ, 0 leaves the auxiliary loss out.
        bands: frequencies of the places, 0: the plain numbers.

    Shape: (B, C, H, W) → (B, num_classes). Features are (B, 1+k, D); maps (B, D, H, W) are zero at other pixels.
    Raises: BadInput for impossible shares or other channels.
    Paper: Hierarchical Sparse Attention Framework for Computationally Efficient Classification of Biological Cells,
        arXiv:2505.07661.
    Departs from the paper: known by a public review of its method. Layer sizes, λ = 0.5, ε = 0.1, Fourier features, the
        bounds and the moving average of the loss are ours.
    """

    pools = ("token", "")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 64,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        depth: int = 1,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        share: float = 0.3,
        least: float | None = 0.05,
        most: float | None = 0.5,
        adaptive: bool = True,
        every: int = 2,
        tolerance: float = 0.01,
        explore: float = 0.1,
        distill: float = 0.5,
        bands: int = 4,
        drop_rate: float = 0.0,
        global_pool: str | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads or not distill >= 0:
            raise BadInput(
                f"num_heads={num_heads} must divide embed_dim={embed_dim}, and distill={distill} must be 0 or more."
            )
        height, width = to_2tuple(img_size)
        budget = PixelBudget((height, width), share, least, most, every, tolerance, adaptive)
        self.selector = PixelSelector(in_chans, embed_dim, budget, explore, bands)
        self.distill = distill
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.stages = nn.ModuleList(
            FineAttention(embed_dim, num_heads, mlp_ratio, qkv_bias=True, attn_layer=Attention, mlp_layer=Mlp, depth=i)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.finish_init([embed_dim] * depth, [1] * depth, num_classes, in_chans, global_pool, drop_rate)
        for module in [*self.stages.modules(), self.head]:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def budget(self) -> PixelBudget:
        """k and its schedule."""
        return self.selector.budget

    # -- from images to logits ---------------------------------------------------------------------------------------

    def select(self, images: Tensor) -> Selection:
        """The pixels of ``images`` (B, C, H, W), as the model sees them (normalised); ``to_map()`` lays them out."""
        return self.selector.select(images)

    def classify(self, images: Tensor, chosen: Selection) -> Tensor:
        """Logits from the pixels in ``chosen`` alone; ``select`` made them, or someone else."""
        state = self._enter(images, chosen)
        for stage in self.stages:
            state = self.step(stage, state)
        return self.forward_head(self.features(state))

    def begin(self, images: Tensor) -> State:
        return self._enter(images, self.select(images))

    def _enter(self, images: Tensor, chosen: Selection) -> State:
        tokens = self.selector.embed(images, chosen)
        x = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        return State(x, chosen, None, self.aux_sink if self.aux_sink is not None else {})

    def as_map(self, state: State) -> Tensor:
        """(B, D, H, W): the tokens at their pixels, zeros elsewhere."""
        return _layout(state).to_grid(state.x[:, 1:]).contiguous()

    def features(self, state: State) -> Tensor:
        if self.training and self.distill and state.weights is not None:
            loss = distillation(state.weights, state.chosen.scores)
            state.aux["sparse-attn-net", len(self.stages) - 1] = self.distill * loss
        return self.norm(state.x)

    def _normed_map(self, state: State) -> Tensor:
        return _layout(state).to_grid(self.norm(state.x)[:, 1:]).contiguous()

    def pool(self, features: Tensor) -> Tensor:
        return features[:, 0] if self.global_pool == "token" else features

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {**super().group_matcher(coarse), "stem": r"^selector|^cls_token"}


def _layout(state: State) -> TokenLayout:
    chosen = state.chosen
    count = chosen.pixels.shape[1]
    rows = torch.arange(count, device=chosen.pixels.device).expand_as(chosen.pixels)
    source = torch.full((rows.shape[0], chosen.size[0] * chosen.size[1]), -1, device=rows.device)
    return TokenLayout(
        grid=chosen.size,
        prefix=(("class", 1),),
        coords=chosen.coords,
        source=source.scatter(1, chosen.pixels, rows),
        aux=state.aux,
    )


default_cfgs = generate_default_cfgs(
    {
        "sparse_attn_net_femto": cfg(input_size=(3, 32, 32), pool_size=None, first_conv="selector.scorer.layers.0"),
        "sparse_attn_net_tiny": cfg(input_size=(3, 64, 64), pool_size=None, first_conv="selector.scorer.layers.0"),
    }
)


@register_model
def sparse_attn_net_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels: 64 wide, one attention layer."""
    return _create("sparse_attn_net_femto", pretrained, {"img_size": 32}, kwargs)


@register_model
def sparse_attn_net_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """64 wide, two attention layers, for images of about 64 pixels; larger ones want a smaller ``share``."""
    return _create("sparse_attn_net_tiny", pretrained, {"img_size": 64, "depth": 2}, kwargs)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    return create(SparseAttnNet, variant, pretrained, defaults, kwargs, out_indices=(-1,))
