"""The iiA block of iiANET in a plain ViT: convolutions and attention side by side on shares of the channels."""

from __future__ import annotations

from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.cells import as_cells, as_tokens
from vitkit.models.iia import IIA
from vitkit.models.layout import TokenLayout
from vitkit.models.prefix_attention import PrefixAttention, renew_prefix
from vitkit.models.spec import PartSpec

# B batch · P prefix tokens · N = h·w patches · D width

#: an attention head is at least this wide, as in the paper's network
HEAD_DIM = 8


class IIABlock(nn.Module):
    """Tokens are laid on their grid, go through :class:`~vitkit.models.iia.IIA`, and come back.

    D/8 channels pass a dilated convolution, 6D/8 an inverted bottleneck, D/8 attention over all patches with 2-D
    relative positions and registers as extra keys and values; each branch is ``ReLU(branch + shortcut)``. The block
    takes the place of attention, MLP, norms and residuals.

    Prefix tokens stand outside of the map: they read the new patches (and each other) by a pre-norm attention with a
    residual, which a warm swap starts from the old block's.

    Args:
        registers: extra keys and values. Default 1.
        heads: of the attention on D/8 channels; None: as many as leave each at least 8 channels wide.
        expansion: of the inverted bottleneck. Default 4.
        scaled: False leaves 1/√d out of the logits, as the published file does.

    Shape: (B, P+N, D), layout → (B, P+N, D), layout.
    Raises: BadInput if D is no multiple of 8, ``heads`` does not divide D/8, or the grid is no plane; ValueError after
        tokens were merged, dropped or padded.
    Paper: iiANET: Inception Inspired Attention Hybrid Network for efficient Long-Range Dependency, arXiv:2407.07603.
    Departs from the paper: constant width and prefix tokens, which its network does not have. Channels cross branches
        nowhere in such blocks, so without prefix tokens the convolutions' 7/8 of a patch stay local. See
        :class:`~vitkit.models.iia.RegisterAttention` for the faults of the published file that are not repeated.
    """

    slot = "block"
    preserves = "none"
    takes_layout = True

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        heads: int | None = None,
        registers: int = 1,
        expansion: int = 4,
        scaled: bool = True,
        prefix: PrefixAttention | None = None,
        depth: int = 0,
    ) -> None:
        super().__init__()
        if dim % 8:
            raise BadInput(f"iia: the width {dim} must be a multiple of 8, as channels are split 1:6:1.")
        share = dim // 8
        if heads is None:
            heads = max([h for h in range(1, share + 1) if share % h == 0 and share // h >= HEAD_DIM], default=1)
        self.iia = IIA(dim, (share, 6 * share, share), heads, grid, registers, expansion, scaled)
        self.prefix, self.depth_index = prefix, depth

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        registers: int = 1,
        heads: int | None = None,
        expansion: int = 4,
        scaled: bool = True,
    ) -> IIABlock:
        prefix = PrefixAttention.of(old, spec, warm)
        return cls(spec.dim, spec.grid, heads, registers, expansion, scaled, prefix, spec.depth or 0)

    def forward(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        if layout.tap is not None:
            x = layout.tap("resid_pre", x, self.depth_index, layout)
        patches = as_tokens(self.iia(as_cells(x, layout, 2, "iia")))
        x = renew_prefix(self.prefix, x, patches, layout, "iia")
        if layout.tap is not None:
            x = layout.tap("resid_post", x, self.depth_index, layout)
        return x, layout
