"""An MLP whose two layers are convolutions of single tokens with kernels that all tokens share."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from vitkit.models.layout import TokenLayout
from vitkit.models.rehost import adopt
from vitkit.models.shared_conv import ConvShape, SharedConv
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Mlp


class ConvShareMLP(Mlp):
    """``fc2(GELU(fc1 x))`` with both layers by :class:`~vitkit.models.shared_conv.SharedConv`.

    A token of width D = c·s² is laid out as c maps of s×s. What the layers are, for hidden width r·D:

    - ``padding="valid"``, ``kernel="full"``: r·D kernels of s×s, then D kernels as large as the hidden numbers laid out
      as squares: exactly the linear layers of a ViT. After a warm swap the host computes what it did.
    - "valid", smaller k: ⌈r·D/s'²⌉ kernels of k×k (s' = s − k + 1), then D kernels of s'×s'.
    - "same": r·c kernels, then c kernels over r·c maps, so that a number sees only 2·(k//2) pixels around it.

    Prefix tokens are convolved like all others.

    Args:
        ratio: r; None: that of the module it replaces.
        kernel, padding, share, maps: see :class:`~vitkit.models.parts.mixers.conv_share.ConvShareAttention`.

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: BadInput if D is not c squares or the kernel does not fit; NeedsFixedGrid or ValueError with ``share=False``
        for another number of tokens, or after tokens were merged or dropped.
    Paper: ConvShareViT: Enhancing Vision Transformers with Convolutional Attention Mechanisms for Free-Space Optical
        Accelerators, arXiv:2504.11517.
    Departs from the paper: as for the mixer. Gated MLPs start fresh, without a gate.
    """

    slot = "mlp"
    preserves = "none"

    shape: ConvShape

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        ratio: float | None = None,
        kernel: int | str = "full",
        padding: Literal["valid", "same"] = "valid",
        share: bool = True,
        maps: int | None = None,
    ) -> ConvShareMLP:
        shape = ConvShape.of("conv-share-mlp", spec.dim, maps, kernel, padding, None if share else spec.num_tokens)
        hidden = max(1, round(spec.dim * (spec.mlp_ratio if ratio is None else ratio)))
        first, second = shape.expand(hidden)
        plain = old if isinstance(old, Mlp) else None
        # the norm of hidden neurons that some MLPs have is as wide as they are
        fits = plain is not None and (
            isinstance(plain.norm, nn.Identity) or plain.fc1.out_features == first.out_features
        )
        new = adopt(cls, plain) if warm and plain is not None and fits else cls(spec.dim, first.out_features)
        new.shape, new.fc1, new.fc2 = shape, first, second  # type: ignore[assignment]
        for layer, before in ((first, plain and plain.fc1), (second, plain and plain.fc2)):
            if warm and isinstance(before, nn.Linear):
                layer.take(before.weight, before.bias)
            elif warm and isinstance(before, SharedConv) and before.tokens is None:
                dense = before.to_linear()
                layer.take(dense.weight, dense.bias)
        return new

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        if self.shape.tokens is not None:
            layout.require_full_grid("conv-share-mlp with share=False")
        return super().forward(x, layout)

    def extra_repr(self) -> str:
        return f"share={self.shape.tokens is None}"
