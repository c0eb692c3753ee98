"""DCT attention inside the windows of a Swin transformer."""

from __future__ import annotations

import copy
import math

import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.constant import Constant
from vitkit.models.dct import dct_rows
from vitkit.models.parts.mixers.dct_attention import compress_projections, kept_per_head

# W windows (all images) · n tokens of a window · C width · h heads


class DCTWindowAttention(WindowAttention):
    """timm's window attention on the first C' DCT coefficients of each token; relative position bias as before.

    Equations, cost and ``scale`` are those of :class:`~vitkit.models.parts.mixers.dct_attention.DCTAttention`.

    Args:
        old: the window attention it replaces; its weights and its bias table are the warm start.
        tau: τ in (0, 1].
        scale: "full" or "head".

    Shape: (W, n, C), mask (windows, n, n) or None → (W, n, C).
    Raises: BadInput if ``tau`` or ``scale`` is out of range, or the heads of ``old`` do not fill its width.
    Paper: Discrete Cosine Transform Based Decorrelated Attention for Vision Transformers, arXiv:2405.13901.
    Departs from the paper: proj is stored as C' → C; the warm start is ours.
    """

    def __init__(self, old: WindowAttention, tau: float = 0.75, scale: str = "full") -> None:
        if not 0 < tau <= 1 or scale not in ("full", "head"):
            raise BadInput(f"tau={tau}, scale={scale!r}: tau must lie in (0, 1], scale must be 'full' or 'head'.")
        dim, heads = old.qkv.in_features, old.num_heads
        if old.qkv.out_features != 3 * dim:
            raise BadInput(f"DCT attention needs heads that fill the width {dim}, not {old.qkv.out_features // 3}.")
        head_dim = kept_per_head(dim, heads, tau)
        super().__init__(
            dim,
            heads,
            head_dim=head_dim,
            window_size=old.window_size,
            attn_drop=old.attn_drop.p,
            proj_drop=old.proj_drop.p,
        )
        kept = heads * head_dim
        self.qkv, self.proj = nn.Linear(kept, 3 * kept), nn.Linear(kept, dim)
        self.fused_attn = old.fused_attn
        self.scale = (dim // heads if scale == "full" else head_dim) ** -0.5
        # compress_projections expects the factor beside 1/√d'
        compress_projections(old.qkv, old.proj, self.qkv, self.proj, heads, self.scale * math.sqrt(head_dim))
        with torch.no_grad():
            self.relative_position_bias_table.copy_(old.relative_position_bias_table)
        self.dct = Constant(dct_rows, dim, kept)
        self.to(old.qkv.weight).train(old.training)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = self.qkv(F.linear(x, self.dct.value)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bias = self._get_rel_pos_bias()  # (1, h, n, n)
        if mask is not None:
            # windows of one image are adjacent in the batch
            images = x.shape[0] // mask.shape[0]
            bias = (bias + mask.unsqueeze(1)).repeat(images, 1, 1, 1)
        dropout = self.attn_drop.p if self.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(z.transpose(1, 2).flatten(2)))


def compress_windows(model: nn.Module, tau: float = 0.75, scale: str = "full") -> nn.Module:
    """A copy of a timm Swin transformer whose window attentions run on DCT coefficients; ``model`` is not changed.

    Raises: BadInput if the model has no window attention.
    """
    model = copy.deepcopy(model)
    found = [name for name, module in model.named_modules() if type(module) is WindowAttention]
    if not found:
        raise BadInput(
            f"{type(model).__name__} has no window attention of timm's Swin. For a plain ViT use "
            'swap(model, "mixer", "dct-attention").'
        )
    for name in found:
        owner, _, child = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, child, DCTWindowAttention(getattr(module, child), tau, scale))
    return model
