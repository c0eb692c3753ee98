"""Rotary positions for any plain ViT: axial, or mixed with learned directions."""

from __future__ import annotations

from typing import Literal

from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingMixed
from torch import Tensor, nn

from vitkit.errors import BadInput, unknown
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.positions.rope import Rotary, RotaryTable
from vitkit.models.spec import PartSpec

# B batch · H heads · P prefix tokens · N patches · d head dim


class RoPE2D(nn.Module):
    """Queries and keys are turned by angles that grow with the token's row r and column c.

    Channel pair t of a head turns by ``θ_t(r, c) = a_t·r + b_t·c``, so ``⟨R(m) q, R(n) k⟩`` depends on the difference
    of the two places only. *Axial*: half of the pairs turn with the row (b_t = 0), half with the column, with
    frequencies ``temperature^(−4t/d)``. *Mixed*: every head and block learns its own (a_t, b_t), which start in random
    directions. Prefix tokens are not turned. Merged tokens turn by their mean place.

    Args:
        head_dim: d, a multiple of 4.
        num_heads: H.
        kind: "mixed" (default) or "axial".
        temperature: of the frequencies; None: 100 for axial, 10 for mixed, as in the paper's programs. Language
            models use 10,000, whose slow turns hardly differ on a grid of 14 rows.
        keep_absolute: False removes the host's table of absolute positions.
        grid: (h, w) whose table is kept ready.

    Shape: ``rotate(q, k, layout)``: (B, H, P+N, d) → the same.
    Raises: BadInput if d is no multiple of 4. UnknownName for another kind.
    Paper: Rotary Position Embedding for Vision Transformer, arXiv:2403.13298; a mechanism of Image Recognition with
        Online Lightweight Vision Transformer: A Survey, arXiv:2505.03113.
    Departs from the paper: nothing known; the tables are timm's.
    """

    slot = "position"
    preserves = "none"
    per_block = True

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        kind: Literal["mixed", "axial"] = "mixed",
        temperature: float | None = None,
        keep_absolute: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("mixed", "axial"):
            raise unknown("kind of rotary positions", kind, ("mixed", "axial"), "vitkit show rope2d")
        if head_dim % 4:
            raise BadInput(
                f"rope2d turns pairs of channels by row and by column, so it needs head dims that are multiples of 4, "
                f"and here they are {head_dim}; choose num_heads so that dim / num_heads is "
                f"{max(4, head_dim // 4 * 4)} or {head_dim // 4 * 4 + 4}."
            )
        shape = None if grid is None else list(grid)
        self.kind, self.keep_absolute = kind, keep_absolute
        self.rope: nn.Module
        if kind == "axial":
            base = 100.0 if temperature is None else temperature
            self.rope = RotaryEmbeddingCat(head_dim, temperature=base, in_pixels=False, feat_shape=shape)
        else:
            base = 10.0 if temperature is None else temperature
            self.rope = RotaryEmbeddingMixed(head_dim * num_heads, 1, num_heads, base, shape)
        self.turn = Rotary(head_dim)

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        kind: Literal["mixed", "axial"] = "mixed",
        temperature: float | None = None,
        keep_absolute: bool = False,
    ) -> RoPE2D:
        """A table of absolute positions has no counterpart here, so ``warm`` changes nothing."""
        return cls(spec.head_dim, spec.num_heads, kind, temperature, keep_absolute, spec.grid)

    def rotate(self, q: Tensor, k: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        return self.turn.rotate(q, k, layout.replace(rotation=RotaryTable.start(self.rope, layout)))

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, keep_absolute={self.keep_absolute}"
