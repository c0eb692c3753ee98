"""Virtual token unmerging (VTU of DyMU): a RoPE model behaves as if it still saw every position."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkit.errors import BadInput

# B batch · H heads · U unique tokens · N positions (N ≥ U) · d head dim · F = d/2 frequency pairs

Pairs = Literal["half", "interleaved"]
# products of one chunk of frequency pairs: 2²⁵ numbers are 128 MB in float32
_CHUNK = 2**25


def vtu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: Tensor,
    angles: Tensor,
    mask: Tensor | None = None,
    impl: Literal["exact", "expand"] = "expand",
    pairs: Pairs = "half",
) -> Tensor:
    """Rotary attention over N positions whose tokens are only U distinct ones; the result is re-merged to U.

    With the one-hot map M (N, U), per frequency pair f and ``δ = θ_m − θ_n``::

        A[m, n] = Σ_f (q₁k₁ + q₂k₂) cos δ + (q₁k₂ − q₂k₁) sin δ,   q, k = M Q, M K
        f = softmax(A/√d + mask) M V,      f' = (MᵀM)⁻¹ Mᵀ f

    Projections, norms and MLP around it then run on U tokens. ``impl="exact"`` is this formula: the products are
    computed between unique tokens only, and gathered. ``impl="expand"`` lays q, k and v out on all positions,
    rotates, calls fused attention and averages back: the same output, less memory, usually faster.

    Args:
        q: (B, H, U, d), not rotated yet.
        k: (B, H, U, d), likewise; repeat grouped key heads first.
        v: (B, H, U, d).
        source: (B, N) long, the token at each position (``layout.source`` of merged tokens, followed by text), -1 for
            a position that nobody may attend to. Tokens of no position come out as zeros.
        angles: (N, F) or (B, N, F) rotation in radians of each position and frequency pair.
        mask: broadcastable to (B, H, N, N); bool, True where query m may attend to key n, or additive.
        impl: "exact" or "expand".
        pairs: which channels rotate together: "half" (i and i + d/2, as in Llama) or "interleaved" (2i and 2i+1).

    Returns: (B, H, U, d), the mean over the positions of each token.

    Raises: BadInput if shapes disagree or an option is unknown.

    Paper: Wang et al., DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs, arXiv:2504.17040.
    Departs from the paper: nothing in "exact"; "expand" is a faster way to the same numbers.
    """
    _check(q, k, v, source, angles, impl, pairs)
    bias, dead = _bias(mask, source, q)
    if impl == "exact":
        out = _exact(q, k, v, source, angles, bias, pairs)
    else:
        q_full, k_full, v_full = (expand(t, source) for t in (q, k, v))
        q_full, k_full = rotate(q_full, angles, pairs), rotate(k_full, angles, pairs)
        out = F.scaled_dot_product_attention(q_full, k_full, v_full, attn_mask=bias)
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
    return remerge(out, source, q.shape[2])


def expand(x: Tensor, source: Tensor) -> Tensor:
    """M x: (B, H, U, d) tokens laid out on positions (B, H, N, d); a position without token gets token 0.

    For decoding, cache ``rotate(expand(k, source), angles)`` and ``expand(v, source)``.
    """
    index = source.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
    return x.gather(2, index)


def remerge(x: Tensor, source: Tensor, num_tokens: int) -> Tensor:
    """(MᵀM)⁻¹ Mᵀ x: mean over the positions of each token, (B, H, N, d) → (B, H, U, d)."""
    there = (source >= 0).to(x.dtype)
    index = source.clamp(min=0)
    counts = x.new_zeros(x.shape[0], num_tokens).scatter_add(1, index, there)
    rows = index[:, None, :, None].expand_as(x)
    summed = x.new_zeros(*x.shape[:2], num_tokens, x.shape[-1])
    summed = summed.scatter_add(2, rows, x * there[:, None, :, None])
    return summed / counts.clamp(min=1)[:, None, :, None]


def rotate(x: Tensor, angles: Tensor, pairs: Pairs = "half") -> Tensor:
    """Rotary position embedding: each channel pair of (B, H, N, d) turned by its angle (N, d/2) or (B, N, d/2)."""
    # sines of far positions need float32 also when x is bf16
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = _over_heads(angles.cos(), wide), _over_heads(angles.sin(), wide)
    x1, x2 = _split(x.to(wide), pairs)
    y1, y2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos
    out = torch.cat([y1, y2], dim=-1) if pairs == "half" else torch.stack([y1, y2], dim=-1).flatten(-2)
    return out.to(x.dtype)


def rope_angles(positions: Tensor, head_dim: int, base: float = 10_000.0) -> Tensor:
    """``θ = position · base^(−2f/d)``: (…,) positions → (…, d/2) angles in radians, float32."""
    frequency = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    return positions.float().unsqueeze(-1) * base**-frequency


def _exact(
    q: Tensor, k: Tensor, v: Tensor, source: Tensor, angles: Tensor, bias: Tensor | None, pairs: Pairs
) -> Tensor:
    batch, num_heads, num_tokens, head_dim = q.shape
    num_positions = source.shape[1]
    index = source.clamp(min=0)
    wide = torch.promote_types(q.dtype, torch.float32)
    theta = (angles if angles.ndim == 3 else angles[None]).to(wide)
    # (B, U, H, F): heads and pairs stand last, so that gathering a pair of tokens copies one contiguous row
    (q1, q2), (k1, k2) = (_split(t.to(wide).transpose(1, 2), pairs) for t in (q, k))
    image = torch.arange(batch, device=q.device)[:, None, None]
    rows, columns = index[:, :, None], index[:, None, :]
    logits = q1.new_zeros(batch, num_positions, num_positions, num_heads)
    per_chunk = max(1, _CHUNK // max(1, batch * num_heads * num_positions**2))
    for start in range(0, head_dim // 2, per_chunk):
        at = slice(start, start + per_chunk)
        a1, a2 = q1[:, :, None, :, at], q2[:, :, None, :, at]
        b1, b2 = k1[:, None, :, :, at], k2[:, None, :, :, at]
        dot, cross = (a1 * b1 + a2 * b2)[image, rows, columns], (a1 * b2 - a2 * b1)[image, rows, columns]
        delta = theta[:, :, None, at] - theta[:, None, :, at]
        cos, sin = (t.expand(batch, -1, -1, -1).unsqueeze(-1) for t in (delta.cos(), delta.sin()))
        logits = logits + (dot @ cos + cross @ sin).squeeze(-1)
    logits = logits.permute(0, 3, 1, 2)
    logits = logits / math.sqrt(head_dim)
    if bias is not None:
        logits = logits + bias
    weights = logits.softmax(dim=-1).to(v.dtype)
    # the weights of all positions of a token add up before they meet its value: W M, then (W M) V
    to = index[:, None, None, :].expand_as(weights)
    per_token = weights.new_zeros(batch, num_heads, num_positions, num_tokens).scatter_add(3, to, weights)
    return per_token @ v


def _bias(mask: Tensor | None, source: Tensor, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Additive (·, ·, N, N) bias in q's dtype, and which queries have no allowed key.

    Those see every key for now, because a softmax over nothing is NaN; their output is set to zero afterwards.
    """
    there = source >= 0
    if mask is None and not torch.compiler.is_compiling() and bool(there.all()):
        return None, None
    bias = q.new_zeros(()).expand(1, 1, 1, 1)
    if mask is not None:
        bias = q.new_zeros(mask.shape).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask.to(q.dtype)
    bias = bias.masked_fill(~there[:, None, None, :], -math.inf)
    dead = (bias == -math.inf).all(-1, keepdim=True)
    return bias.masked_fill(dead, 0.0), dead


def _split(x: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    if pairs == "half":
        first, second = x.chunk(2, dim=-1)
        return first, second
    return x[..., 0::2], x[..., 1::2]


def _over_heads(per_position: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, F) or (B, N, F) → broadcastable to (B, H, N, F)."""
    return (per_position[:, None] if per_position.ndim == 3 else per_position[None, None]).to(dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, source: Tensor, angles: Tensor, impl: str, pairs: str) -> None:
    if impl not in ("exact", "expand"):
        raise BadInput(f"impl={impl!r} is unknown; use 'exact' or 'expand'.")
    if pairs not in ("half", "interleaved"):
        raise BadInput(f"pairs={pairs!r} is unknown; use 'half' or 'interleaved'.")
    if q.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3] or q.shape[-1] % 2:
        raise BadInput(
            f"q, k and v must be (B, H, U, d) with an even d; got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)}. Repeat grouped key heads first."
        )
    if source.ndim != 2 or source.shape[0] != q.shape[0] or source.dtype != torch.long:
        raise BadInput(f"source must be (B={q.shape[0]}, N) long; got {tuple(source.shape)} {source.dtype}.")
    if angles.shape[-2:] != (source.shape[1], q.shape[-1] // 2):
        raise BadInput(
            f"angles must end in (N={source.shape[1]}, d/2={q.shape[-1] // 2}); got {tuple(angles.shape)}. "
            "Merged tokens keep the angles of all N positions."
        )
