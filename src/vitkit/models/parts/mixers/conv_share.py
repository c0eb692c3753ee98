"""Self-attention whose projections are convolutions of single tokens with kernels that all tokens share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.rehost import adopt
from vitkit.models.shared_conv import ConvShape, SharedChain, SharedConv, squares
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Attention


class ConvShareAttention(Attention):
    """``softmax(q kᵀ/√d) v`` with q, k, v and the output by :class:`~vitkit.models.shared_conv.SharedConv`.

    A token of width D = c·s² is laid out as c maps of s×s, and every token is convolved with the same kernels, which is
    what a 4f correlator does to a plane of tiles; softmax and the products of attention stay electronic. What the four
    projections are:

    - ``padding="valid"``, ``kernel="full"``: D kernels of s×s, one number each: exactly the linear layers of a ViT.
      After a warm swap the host computes what it did.
    - "valid", smaller k: ⌈D/s'²⌉ kernels of k×k (s' = s − k + 1), GELU, then D kernels of s'×s'.
    - "same": c kernels (of c maps each), so that the width stays: each number sees only k//2 pixels around it. By the
      paper such models do not learn attention; kept as the control.

    Prefix tokens are convolved like all others. :func:`~vitkit.models.diagnostics.optical4f.optical4f` says how many
    frames of light it takes.

    Args:
        kernel: "full" (s), "half" (s/2, rounded up), or k in pixels, 1 to s.
        padding: "valid" or "same".
        share: False gives each token kernels of its own, for the number of tokens the part is built for.
        maps: c; None: as few as the width allows (64: 1, 96: 6, 192: 3, 768: 3).

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: BadInput if D is not c squares or the kernel does not fit; NeedsFixedGrid or ValueError with ``share=False``
        for another number of tokens, or after tokens were merged or dropped.
    Paper: ConvShareViT: Enhancing Vision Transformers with Convolutional Attention Mechanisms for Free-Space Optical
        Accelerators, arXiv:2504.11517.
    Departs from the paper: known by its abstract. Tokens as maps, several maps a token, the two layers of small valid
        kernels and their width are ours. Only full-size shared valid kernels start from the old weights.
    """

    slot = "mixer"
    preserves = "none"
    # softmax takes out what is the same in every key
    no_gradient = ("qkv.k.bias", "qkv.k.last.bias")

    shape: ConvShape

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        kernel: int | str = "full",
        padding: Literal["valid", "same"] = "valid",
        share: bool = True,
        maps: int | None = None,
    ) -> ConvShareAttention:
        shape = ConvShape.of("conv-share", spec.dim, maps, kernel, padding, None if share else spec.num_tokens)
        # other attentions than the host's own may keep anything in their projections
        plain = old if type(old) is Attention else None
        width = spec.dim if plain is None else plain.num_heads * plain.head_dim
        if width != spec.dim and not shape.is_linear:
            raise BadInput(
                f"conv-share: the heads of this attention are {width} wide together and a token {spec.dim}; only "
                'kernel="full", padding="valid", share=True can change the width.'
            )
        if warm and plain is not None:
            # shares the norms, dropouts and positions of the old one
            new = adopt(cls, plain)
        else:
            new = cls(spec.dim, spec.num_heads, attn_head_dim=width // spec.num_heads, qkv_bias=True)
            if isinstance(old, Attention):
                new.fused_attn, new.normalizer = old.fused_attn, old.normalizer
                new.position = nn.ModuleList(old.position)
        new.shape = shape
        bias = plain is None or plain.qkv.bias is not None
        new.qkv = ThreeProjections(*(shape.project(width, bias) for _ in "qkv"))  # type: ignore[assignment]
        back = shape
        if width != spec.dim:
            # heads of another total width fill maps of their own
            maps, side = squares(width)
            back = ConvShape(maps=maps, side=side, kernel=side, padding="valid", tokens=None)
        proj_bias = plain is None or plain.proj.bias is not None
        new.proj = back.project(spec.dim, proj_bias)  # type: ignore[assignment]
        if warm and plain is not None and shape.is_linear and isinstance(plain.qkv, nn.Linear):
            biases = (None, None, None) if plain.qkv.bias is None else plain.qkv.bias.chunk(3)
            for layer, weight, own in zip(new.qkv.children(), plain.qkv.weight.chunk(3), biases):
                layer.take(weight, own)  # type: ignore[operator]
            new.proj.take(plain.proj.weight, plain.proj.bias)
        return new

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        if self.shape.tokens is not None:
            layout.require_full_grid("conv-share with share=False")
        return super().forward(x, layout)

    def standard(self) -> Attention:
        """The same function with linear projections.

        Raises: BadInput if the projections are not linear, or not the same for all tokens.
        """
        layers = [*self.qkv.children(), self.proj]
        if not all(isinstance(layer, SharedConv) and layer.tokens is None for layer in layers):
            raise BadInput(
                "These projections are convolutions that no linear layer equals, so no other mixer can start from "
                "them; undo this swap before the next."
            )
        q, k, v, proj = (layer.to_linear() for layer in layers)  # type: ignore[operator]
        new = adopt(Attention, self)
        new.qkv = nn.Linear(q.in_features, 3 * q.out_features, bias=q.bias is not None).to(q.weight)
        with torch.no_grad():
            new.qkv.weight.copy_(torch.cat([q.weight, k.weight, v.weight]))
            if q.bias is not None:
                new.qkv.bias.copy_(torch.cat([q.bias, k.bias, v.bias]))
        new.proj = proj
        new.__dict__.pop("shape")
        return new

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, share={self.shape.tokens is None}"


class ThreeProjections(nn.Module):
    """q, k and v by layers of their own, side by side: (B, n, D) → (B, n, 3·H·d)."""

    def __init__(self, q: SharedConv | SharedChain, k: SharedConv | SharedChain, v: SharedConv | SharedChain) -> None:
        super().__init__()
        self.q, self.k, self.v = q, k, v
        self.in_features, self.out_features = q.in_features, 3 * q.out_features
        for layer in (q, k, v):
            (layer if isinstance(layer, SharedConv) else layer.last).reset_parameters(joint=3)

    @property
    def bias(self) -> Tensor | None:
        """That of q: whether there are any, as of a linear layer."""
        return self.q.bias if isinstance(self.q, SharedConv) else self.q.last.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)
