"""DCFormer's block in a plain ViT: decomposed depthwise convolution and MLP under one residual."""

from __future__ import annotations

from torch import Tensor, nn

from vitkit.models.cells import as_cells, as_tokens
from vitkit.models.decomposed_conv import DecompBlock
from vitkit.models.layout import TokenLayout
from vitkit.models.prefix_attention import PrefixAttention, renew_prefix
from vitkit.models.spec import PartSpec

# B batch · P prefix tokens · N patches · D width


class DCFormerBlock(nn.Module):
    """``x + γ · MLP(Σ_a BN_a(DWConv_a(x)))`` on the patches, see :class:`~vitkit.models.decomposed_conv.DecompBlock`.

    Prefix tokens have no cell: they read the new patches (and each other) by a pre-norm attention with a residual. A
    warm swap starts that from the old block's attention, and the MLP from the old one if it is as wide.

    Args:
        k: cells of the kernels, odd. Default 7.
        dims: axes of the grid: 2 for images, 3 for tokens on (t, h, w).
        mlp_ratio: hidden width over D; None: that of the block it replaces.
        layer_scale: first value of γ. Default 1e-6, so that the block starts as nearly the identity on patches.

    Shape: (B, P+N, D), layout → (B, P+N, D), layout.
    Raises: BadInput for an even ``k``, a grid of other than ``dims`` axes, or prefix tokens in a host built without;
        ValueError after tokens were merged, dropped or padded.
    Paper: DCFormer: Efficient 3D Vision-Language Modeling with Decomposed Convolutions, arXiv:2502.05091.
    Departs from the paper: prefix tokens, which its network does not have.
    """

    slot = "block"
    preserves = "none"
    takes_layout = True

    def __init__(
        self,
        dim: int,
        k: int = 7,
        dims: int = 2,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        prefix: PrefixAttention | None = None,
        depth: int = 0,
    ) -> None:
        super().__init__()
        self.body = DecompBlock(dim, k, dims, mlp_ratio, layer_scale, drop_path)
        self.prefix, self.depth_index = prefix, depth

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        k: int = 7,
        dims: int = 2,
        mlp_ratio: float | None = None,
        layer_scale: float = 1e-6,
    ) -> DCFormerBlock:
        ratio = spec.mlp_ratio if mlp_ratio is None else mlp_ratio
        drop = float(getattr(getattr(old, "drop_path1", None), "drop_prob", None) or 0.0)
        prefix = PrefixAttention.of(old, spec, warm)
        new = cls(spec.dim, k, dims, ratio, layer_scale, drop, prefix, spec.depth or 0)
        for name in ("fc1", "fc2"):
            theirs, own = getattr(getattr(old, "mlp", None), name, None), getattr(new.body, name)
            if warm and isinstance(theirs, nn.Linear) and theirs.weight.shape == own.weight.shape:
                own.load_state_dict(theirs.state_dict(), strict=False)
        return new

    def forward(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        if layout.tap is not None:
            x = layout.tap("resid_pre", x, self.depth_index, layout)
        cells = as_cells(x, layout, self.body.conv.dims, "dcformer-block", f"give dims={len(layout.grid)}")
        x = renew_prefix(self.prefix, x, as_tokens(self.body(cells)), layout, "dcformer-block")
        if layout.tap is not None:
            x = layout.tap("resid_post", x, self.depth_index, layout)
        return x, layout
