"""Attention over space and time that looks along two axes under one softmax: every place now, this place always."""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown
from vitkit.models.layout import TokenLayout
from vitkit.models.rehost import adopt
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Attention

# B batch · H heads · P prefix tokens · T dates · N places of a date · d head dim

Variant = Literal["full", "diff"]


class STGA(Attention):
    """Spatio-temporal gyroscope attention: a token sees all tokens of its date and its own place at all other dates.

    With q, k, v (B, H, T, N, d): ``S_t = q_t k_tᵀ/√d`` over the N places of a date, ``R_n = q_n k_nᵀ/√d`` over the T
    dates of a place, its diagonal left out since the token itself is in S; one softmax over both. That costs
    O(TN² + NT²) instead of O(T²N²), and no (TN)×(TN) matrix is made.

    ``variant="diff"`` approximates S by the element-wise medians M over the dates, one N×N matrix a head for all dates:
    ``S_t ≈ M_Q M_Kᵀ/√d + D_t 1ᵀ`` with ``D_t = ReLU(BN(W(q_t − M_Q)))`` (N×1), W: d → 1. D weighs a date's places
    against the other dates, so that tokens that changed look more at their own date. Batch statistics of BN are over
    heads, dates and places of a batch; in eval mode its running ones are used.

    Grid (t, h, w): the above. Grid (h, w), or t = 1: the host's own attention, whichever the variant. Prefix tokens see
    every row and every row sees them, in the same softmax.

    Args:
        variant: "full" or "diff". Default "full".
        scaled: divide the logits by √d. The authors' program does not; a warm start with False divides the weights of
            the queries instead, so that the model computes the same at first.

    Shape: (B, P+TN, D) → (B, P+TN, D).
    Raises: UnknownName for another variant; BadInput on several dates with position biases, edits of the logits or
        another normaliser than softmax, which work on the matrix that is never made; ValueError on several dates after
        tokens were merged or dropped.
    Paper: TiMo: Spatiotemporal Foundation Model for Satellite Image Time Series, arXiv:2505.08723.
    Departs from the paper: logits are scaled; prefix tokens join. For an even number of dates the median is the lower
        of the two in the middle, as in the authors' program. On one date the difference from the median is zero, and
        D is left out (in the program it is a constant there, which cancels). Attention maps of several dates are not
        offered to taps.
    """

    slot = "mixer"
    preserves = "exact"
    # of variant="diff" on one date
    no_gradient = ("difference",)

    variant: Variant = "full"
    scaled = True

    @classmethod
    def from_standard(
        cls, old: nn.Module | None, spec: PartSpec, warm: bool = True, variant: Variant = "full", scaled: bool = True
    ) -> STGA:
        if not warm or not isinstance(old, Attention):
            new = cls(spec.dim, num_heads=spec.num_heads, qkv_bias=True)
        else:
            new = adopt(cls, old)
            if not scaled:
                new.qkv = _smaller_queries(old)
        new.set_variant(variant, scaled)
        return new

    def set_variant(self, variant: Variant, scaled: bool = True) -> None:
        """Compute like this from now on; "diff" gets a fresh W and BN."""
        if variant not in get_args(Variant):
            raise unknown("variant", variant, get_args(Variant), "vitkit show stga")
        self.variant, self.scaled = variant, scaled
        if variant == "diff":
            project = nn.Linear(self.head_dim, 1, bias=False)
            nn.init.trunc_normal_(project.weight, std=0.02)
            self.difference = nn.Sequential(project, nn.BatchNorm1d(1), nn.ReLU())

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        return (q if self.scaled else q * self.head_dim**0.5), k, v

    # -- several dates --------------------------------------------------------------------------------------------

    def _needs_weights(self, layout: TokenLayout) -> bool:
        return _num_dates(layout) > 1 or super()._needs_weights(layout)

    def _explicit(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, layout: TokenLayout
    ) -> Tensor:
        if _num_dates(layout) == 1:
            return super()._explicit(q, k, v, bias, mask, layout)
        dates, h, w = layout.require_full_grid("Gyroscope attention over several dates")
        if bias is not None or layout.edits or self.normalizer is not None:
            what = "biases and edits of the logits" if self.normalizer is None else type(self.normalizer).__name__
            raise BadInput(
                f"Gyroscope attention over {dates} dates makes no matrix of all tokens, on which {what} would work; "
                "use softmax, and positions that are added to tokens or turn queries and keys."
            )
        num_prefix = layout.num_prefix
        (prefix_k, k_grid), (prefix_v, v_grid) = (
            (rows[:, :, :num_prefix], rows[:, :, num_prefix:].unflatten(2, (dates, h * w))) for rows in (k, v)
        )
        q_grid = q[:, :, num_prefix:].unflatten(2, (dates, h * w))
        z = self.gyroscope(q_grid, k_grid, v_grid, prefix_k, prefix_v).flatten(2, 3)
        if not num_prefix:
            return z
        drop = self.attn_drop.p if self.training else 0.0
        return torch.cat([F.scaled_dot_product_attention(q[:, :, :num_prefix], k, v, dropout_p=drop), z], 2)

    def gyroscope(self, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        """What the patch tokens find.

        Args:
            q, k, v: (B, H, T, N, d), T > 1. prefix_k, prefix_v: (B, H, P, d).

        Returns: (B, H, T, N, d).
        """
        if self.training and self.attn_drop.p:
            elsewhere, here = self.weights(q, k, prefix_k)
            return self.attn_drop(here) @ v + _gather(self.attn_drop(elsewhere), v, prefix_v)
        logits = self._elsewhere(q, k, prefix_k)
        found, mass = _gather(logits.softmax(-1), v, prefix_v), logits.logsumexp(-1, keepdim=True)
        if self.variant == "full":
            return self._joint_fused(q, k, v, found, mass)
        shared, change = self._medians(q, k)
        top = shared.logsumexp(-1, keepdim=True)
        # one matrix of weights for all dates: their values stand side by side
        here = (shared - top).exp() @ v.transpose(2, 3).flatten(3)
        here = here.unflatten(3, (q.shape[2], -1)).transpose(2, 3)
        share = (top.unsqueeze(2) + change - mass).sigmoid()
        return found + share * (here - found)

    def weights(self, q: Tensor, k: Tensor, prefix_k: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of every token to (other dates of its place, then the prefix) and to the places of its date.

        The two together sum to 1; the weight of the own date among the dates is 0, as it is in the second.

        Args:
            q, k: (B, H, T, N, d), T > 1. prefix_k: (B, H, P, d).

        Returns: (B, H, T, N, T+P) and (B, H, T, N, N).
        """
        elsewhere = self._elsewhere(q, k, prefix_k)
        joint = torch.cat([elsewhere, self.spatial_logits(q, k)], -1).softmax(-1)
        return joint[..., : elsewhere.shape[-1]], joint[..., elsewhere.shape[-1] :]

    def spatial_logits(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, H, T, N, N): S, or what stands for it in the variant "diff"."""
        if self.variant == "full":
            return (q * self.scale) @ k.transpose(-2, -1)
        shared, change = self._medians(q, k)
        return shared.unsqueeze(2) + change

    def _medians(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """``M_Q M_Kᵀ/√d`` (B, H, N, N) and D (B, H, T, N, 1)."""
        middle_q, middle_k = _median(q), _median(k)
        project, norm, act = self.difference
        raw = project(q - middle_q.unsqueeze(2))
        # all of them are one channel of one image for the norm
        change = act(norm(raw.reshape(1, 1, -1))).view_as(raw)
        return (middle_q * self.scale) @ middle_k.transpose(-2, -1), change

    def _elsewhere(self, q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
        """(B, H, T, N, T+P): logits of the place at the dates, −∞ at the own one, and of the prefix tokens."""
        scaled = q * self.scale
        over_dates = scaled.transpose(2, 3) @ k.permute(0, 1, 3, 4, 2)
        own = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
        over_dates = over_dates.masked_fill(own, -torch.inf).transpose(2, 3)
        return torch.cat([over_dates, scaled @ prefix_k.transpose(-2, -1).unsqueeze(2)], -1)

    def _joint_fused(self, q: Tensor, k: Tensor, v: Tensor, found: Tensor, mass: Tensor) -> Tensor:
        """One softmax by the fused kernel: for each date, one more key stands for all that is elsewhere.

        A channel of its own hands ``mass``, the log-sum-exp of the logits elsewhere, from the query to that key, and a
        channel of the values returns the weight that the key got; ``found`` is what is there.
        """
        dim = q.shape[-1]
        # kernels on GPUs want a multiple of 8 channels
        pad = (0, -(dim + 1) % 8 + 1)
        q = torch.cat([q * self.scale, F.pad(mass.to(q.dtype), (0, pad[1] - 1))], -1).flatten(1, 2)
        k, v = (F.pad(rows, pad).flatten(1, 2) for rows in (k, v))
        one = F.pad(q.new_ones(*q.shape[:2], 1, 1), (dim, pad[1] - 1))
        k, v = torch.cat([k, one], 2), torch.cat([v, one], 2)
        z = F.scaled_dot_product_attention(q, k, v, scale=1.0).view(*found.shape[:-1], -1)
        return z[..., :dim] + z[..., dim : dim + 1] * found

    def extra_repr(self) -> str:
        return f"variant={self.variant!r}" + ("" if self.scaled else ", scaled=False")


def _num_dates(layout: TokenLayout) -> int:
    return layout.grid[0] if len(layout.grid) == 3 else 1


def _median(x: Tensor) -> Tensor:
    """(B, H, T, N, d) → (B, H, N, d), the lower of two in the middle; its gradient goes to the element that it is."""
    # not torch.median, which is wrong on expanded tensors (PyTorch 2.15, CPU) and not deterministic on GPUs
    return x.sort(2).values[:, :, (x.shape[2] - 1) // 2]


def _gather(weights: Tensor, v: Tensor, prefix_v: Tensor) -> Tensor:
    """Sum values over dates and prefix: weights (B, H, T, N, T+P), v (B, H, T, N, d) → (B, H, T, N, d)."""
    dates = v.shape[2]
    over_dates = weights[..., :dates].transpose(2, 3) @ v.transpose(2, 3)
    return over_dates.transpose(2, 3) + weights[..., dates:] @ prefix_v.unsqueeze(2)


def _smaller_queries(old: Attention) -> nn.Linear:
    """A copy of the projection whose queries are divided by √d."""
    if not isinstance(old.q_norm, nn.Identity):
        raise BadInput(
            "scaled=False would have to divide the weights of the queries by √d, but this model normalises its "
            "queries; leave scaled=True, or start with warm=False."
        )
    new = copy.deepcopy(old.qkv)
    with torch.no_grad():
        for tensor in new.parameters():
            tensor[: len(tensor) // 3] *= old.head_dim**-0.5
    return new
