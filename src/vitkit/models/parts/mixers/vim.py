"""Vision Mamba's block: the path through the patches is walked forwards and backwards."""

from __future__ import annotations

from vitkit.models.parts.mixers.mamba import Mamba


class Vim(Mamba):
    """Two causal convolutions and selective scans along one path, forwards and backwards, under one gate.

    ``(u, z) = W_in x``; ``update = W_out ((SSM₁(SiLU(conv₁ u)) + flip SSM₂(SiLU(conv₂ flip u))) ⊙ SiLU(z))``. Every
    token hears every other, in linear time.

    Args:
        dim: D.
        order: path through the grid, see :func:`~vitkit.models.time_order.time_order`; or "score": by a learned score
            of each token, which also scales what it sends. For grids (T, h, w) see
            :class:`~vitkit.models.parts.mixers.mamba.Mamba`.
        expand: E/D, inner channels over those of a token.
        d_state: S, states per channel.
        d_conv: taps of the convolutions.
        dt_rank: R of the steps; None: ⌈D/16⌉.
        prefix: "first", "middle" (default) or "last" in the path; "attend": outside of it, each prefix token takes one
            attention over all tokens instead.
        grid: (h, w) whose path is kept ready.
        num_heads: of the attention for "attend".
        num_prefix: P, so that no attention is made without prefix tokens.

    Shape: (B, P+N, D) → (B, P+N, D). Works on merged, dropped and padded tokens.
    Raises: UnknownName for another order or place; BadInput for sizes below 1.
    Paper: Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
        arXiv:2401.09417; one of the mechanisms of Vision Mamba in Remote Sensing, arXiv:2505.00630.
    Departs from the paper: several prefix tokens stand together in the middle; paths other than rows.
    """

    mirrored = True
    default_prefix = "middle"
