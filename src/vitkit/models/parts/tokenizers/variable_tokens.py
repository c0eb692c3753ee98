"""Patch embedding per channel, with channels that may be left out: for images whose channels are variables."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.cross_attention import CrossAttention
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

# B batch · V variables (channels) · N patches · D width · H heads · d = D/H · p patch


class VariableTokens(nn.Module):
    """Embeds the patches of every variable apart, then makes one token of all variables at a place by attention.

    ``x_bvn = E_v patch_bvn + e_v`` with a matrix and a vector per variable v, then ``token_bn = Attention(query,
    {x_bvn}_v)`` with one learned query for all places. The tokens of a forward may come from any subset of the
    variables, so a model trained on many runs where some are missing. As the query is the same everywhere, keys and
    values are never written down: ``q·K x = (Kᵀq)·x`` and ``Σ_v a_v V x_v = V Σ_v a_v x_v``, which costs 2HD instead
    of 2D² multiplications per variable and place, and equals :class:`~vitkit.models.cross_attention.CrossAttention`.

    Args:
        dim: D. num_heads: H of the aggregation, divides D.
        patch_size: p in pixels. img_size: (H, W) the host was built for. in_chans: V.
        dynamic_img_pad: fill images up with zeros to whole patches.

    Shape: images (B, V, H, W) → tokens (B, N, D), layout; ``variables`` picks V' of the V by number, in the order of
        the channels of the images, then (B, V', H, W).

    Raises: BadInput if the channels are not as many as the variables, an image cannot be cut into whole patches, or
    another part stands in the slot already.

    Paper: Reslim of ORBIT-2: Scaling Exascale Vision Foundation Models for Weather and Climate Downscaling,
        arXiv:2505.04802; the aggregation comes from ClimaX, arXiv:2301.10343.

    Departs from the paper: the embedding has no bias beside e_v, which does the same. Query and e_v start as small
    random numbers, not at zero. Put into a host that has weights, it starts as the host's patch embedding: E_v is V
    times the kernel of channel v, e_v its bias, the query is zero and the value and output projections are identities.
    """

    slot = "tokenizer"
    preserves = "exact"
    # with one variable there is nothing to weigh
    no_gradient = ("patch_embed.query", "patch_embed.attention.q.")

    @classmethod
    def from_standard(cls, old: nn.Module, spec: PartSpec, warm: bool = True) -> VariableTokens:
        if getattr(old, "slot", None) == "tokenizer" and not isinstance(old, cls):
            raise BadInput(
                f"variable-tokens takes the place of the patch embedding, but the tokenizer is {type(old).__name__}; "
                "put variable-tokens in first."
            )
        new = cls(
            spec.dim, spec.num_heads, spec.patch_size, spec.image_size, spec.in_chans,
            getattr(old, "dynamic_img_pad", False),
        )  # fmt: skip
        if warm and isinstance(old, PatchEmbed):
            new.start_as(old)
        return new

    def __init__(
        self,
        dim: int,
        num_heads: int,
        patch_size: tuple[int, int],
        img_size: tuple[int, int],
        in_chans: int,
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.img_size, self.dynamic_img_pad = tuple(patch_size), tuple(img_size), dynamic_img_pad
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = math.prod(self.grid_size)
        pixels = math.prod(self.patch_size)
        # as a convolution of one channel would start
        self.kernel = nn.Parameter(torch.empty(in_chans, pixels, dim).uniform_(-(pixels**-0.5), pixels**-0.5))
        self.variable_embed = nn.Parameter(torch.empty(in_chans, dim))
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.variable_embed, std=0.02)
        nn.init.trunc_normal_(self.query, std=0.02)
        self.attention = CrossAttention(dim, num_heads, qkv_bias=False)
        self.norm: nn.Module = nn.Identity()

    @property
    def num_variables(self) -> int:
        return len(self.kernel)

    @torch.no_grad()
    def start_as(self, old: PatchEmbed) -> None:
        """Take over the weights of a patch embedding, so that the tokens are the same."""
        kernel = old.proj.weight
        dim, chans = kernel.shape[:2]
        self.kernel.copy_(chans * kernel.flatten(2).permute(1, 2, 0))
        self.variable_embed.copy_(torch.zeros(dim) if old.proj.bias is None else old.proj.bias)
        self.query.zero_()
        self.attention.kv.weight[dim:].copy_(torch.eye(dim))
        self.attention.proj.weight.copy_(torch.eye(dim))
        self.norm = copy.deepcopy(old.norm)

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
        """The grid (h, w) of an image of (H, W) pixels."""
        (height, width), (p_h, p_w) = img_size, self.patch_size
        if self.dynamic_img_pad:
            return math.ceil(height / p_h), math.ceil(width / p_w)
        return height // p_h, width // p_w

    def forward(self, images: Tensor, variables: Sequence[int] | None = None) -> tuple[Tensor, TokenLayout]:
        kernel: Tensor = self.kernel
        embed: Tensor = self.variable_embed
        if variables is not None:
            kernel, embed = kernel[list(variables)], embed[list(variables)]
        if images.shape[1] != len(kernel):
            raise BadInput(
                f"The images have {images.shape[1]} channels, but {len(kernel)} variables are expected; give one "
                "channel for each, or say which of them these are."
            )
        (height, width), (p_h, p_w) = images.shape[-2:], self.patch_size
        if self.dynamic_img_pad:
            images = F.pad(images, (0, -width % p_w, 0, -height % p_h))
        elif height % p_h or width % p_w:
            raise BadInput(
                f"Fields of {height}×{width} cells cannot be cut into patches of {p_h}×{p_w}; cut them to "
                f"{max(height // p_h, 1) * p_h}×{max(width // p_w, 1) * p_w}."
            )
        cut = images.unflatten(-1, (-1, p_w)).unflatten(-3, (-1, p_h))  # (B, V, h, p, w, p)
        grid = (cut.shape[2], cut.shape[4])
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)  # (B, N, V, p·p)
        x = torch.einsum("bnvp,vpd->bnvd", patches, kernel) + embed
        return self.norm(self.aggregate(x)), TokenLayout(grid=grid)

    def aggregate(self, x: Tensor) -> Tensor:
        """Embedded variables (B, N, V, D) → tokens (B, N, D)."""
        attention = self.attention
        heads = attention.num_heads
        key, value = attention.kv.weight.unflatten(0, (2, heads, -1)).unbind(0)  # (H, d, D) each
        query = attention.q(self.query).reshape(heads, -1) * attention.head_dim**-0.5
        # the query in the space of the embedded variables
        seen_from = torch.einsum("hk,hkd->hd", query, key)
        weights = torch.einsum("bnvd,hd->bnhv", x, seen_from).softmax(-1).to(x.dtype)
        mixed = torch.einsum("bnhv,bnvd->bnhd", weights, x)
        return attention.proj(torch.einsum("bnhd,hkd->bnhk", mixed, value).flatten(2))
