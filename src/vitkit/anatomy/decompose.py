"""Write the final residual stream as an exact sum of its writers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitkit.anatomy.capture import Trace
from vitkit.anatomy.host import host
from vitkit.anatomy.untouched import untouched
from vitkit.models.vit import Attention


@dataclass(frozen=True)
class Decomposition:
    """``units[:, :, r]`` summed over r is the residual stream after the last block, exactly.

    Attributes:
        units: (B, T, R, D) with R = 1 + L·H + L; T = P+N rows.
        names: R names: ``embed``, ``blocks.{l}.head.{h}``, ``blocks.{l}.mlp``.
        stream: (B, T, D), the stream itself.
    """

    units: Tensor
    names: tuple[str, ...]
    stream: Tensor

    def through_final_norm(self, norm: nn.LayerNorm) -> Tensor:
        """(B, T, R, D) parts of the normalised stream, with each row's own mean and std frozen.

        ``γ·(u_r − μ_r)/σ + β/R`` where μ_r is the unit's own channel mean; since the μ_r sum to the stream's mean,
        the parts sum exactly to ``norm(stream)``.
        """
        std = (self.stream.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt().unsqueeze(-2)
        centred = self.units - self.units.mean(-1, keepdim=True)
        parts = centred / std
        if norm.weight is not None:
            parts = parts * norm.weight
        if norm.bias is not None:
            parts = parts + norm.bias / self.units.shape[2]
        return parts


@torch.no_grad()
def decompose_residual(model: nn.Module, images: Tensor) -> Decomposition:
    """Split the last residual stream into what the embedding, every head and every MLP wrote.

    A head's part is its output times its slice of the output projection, LayerScale applied; the projection's bias
    is shared equally among the heads of the block.

    Args:
        model: a host or a wrapper around one; standard attention without output norm or gate, skips on.
        images: (B, C, H, W).

    Raises: ValueError when a block has another mixer, an output norm or gate, a missing skip, or merges tokens, or
        when the parts do not add up to the stream (a projection that rounds its inputs, an adapter beside it).
    """
    vit = host(model)
    for i, block in enumerate(vit.blocks):
        attn = getattr(block, "attn", None)
        plain = (
            isinstance(attn, Attention) and isinstance(attn.norm, nn.Identity) and getattr(attn, "gate", None) is None
        )
        if not (plain and block.skip_attn and block.skip_mlp and block.reduce is None):
            raise ValueError(f"blocks.{i} is not a standard residual block, so its stream has no exact sum of heads.")
    with (
        untouched(model),
        Trace(model, ["embed", "blocks.*.attn.z", "blocks.*.mlp.out", "blocks.*.resid_post"]) as trace,
    ):
        model(images)
    units, names = [trace["embed"].unsqueeze(2)], ["embed"]
    for i, block in enumerate(vit.blocks):
        z = trace[f"blocks.{i}.attn.z"]
        weight = block.attn.proj.weight.unflatten(1, (z.shape[2], z.shape[3]))
        per_head = torch.einsum("bthd,ohd->btho", z, weight)
        if block.attn.proj.bias is not None:
            per_head = per_head + block.attn.proj.bias / z.shape[2]
        units += [block.ls1(per_head), trace[f"blocks.{i}.mlp.out"].unsqueeze(2)]
        names += [*(f"blocks.{i}.head.{h}" for h in range(z.shape[2])), f"blocks.{i}.mlp"]
    stream, parts = trace[f"blocks.{len(vit.blocks) - 1}.resid_post"], torch.cat(units, dim=2)
    gap = float((parts.sum(2) - stream).abs().max() / stream.abs().max().clamp(min=torch.finfo(stream.dtype).tiny))
    # half precision rounds the stream after every block
    if not gap <= (1e-3 if stream.dtype in (torch.float32, torch.float64) else 0.1):
        raise ValueError(
            f"The parts miss the residual stream by {gap:.1%} of its largest entry, so a block does more than its "
            "attention's heads and its MLP write: take out quantized projections, adapters and mixers of your own."
        )
    return Decomposition(parts, tuple(names), stream)
