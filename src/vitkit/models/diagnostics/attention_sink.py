"""Where attention drains to: the class token, a few patches, or nowhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitkit.anatomy.capture import Trace
from vitkit.anatomy.host import host
from vitkit.anatomy.untouched import untouched
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.normalized import to_model_space
from vitkit.models.parts.readouts.edit import EDITDecoder

# B batch · H heads · L blocks · P prefix tokens · N patches

# a patch is a sink if it gets this many times its even share, 1/N
SINK = 4.0


@dataclass(frozen=True)
class SinkRow:
    """Attention sinks of one block; means over the images. Attention is the mean over heads and patch queries.

    ``class_mass``: share of the attention that goes to the class token, 0 in a host without one. ``max_patch``: N times
    the share of the patch that gets most; 1 if all get the same. ``num_sinks``: patches with a share above 4/N.
    ``num_outliers``: patches whose token after the block has a norm above ``outlier`` times the image's median.
    """

    depth: int
    class_mass: float
    max_patch: float
    num_sinks: float
    num_outliers: float


@torch.no_grad()
def attention_sink(model: nn.Module, images: Tensor, outlier: float = 3.0) -> list[SinkRow]:
    """How much attention of the patches drains to the class token and to single patches, block by block.

    With a_ij the attention of patch query i to row j, mean over heads: ``m_j = mean_i a_ij``.

    Args:
        model: a host or a wrapper around one; left as found.
        images: (B, C, H, W) in [0, 1].
        outlier: norms above this multiple of the median count as outliers.

    Returns: one row a block.
    Raises: LookupError if a block has no attention weights; BadInput for an ``outlier`` of at most 1, or for weights
        that are not between all tokens.
    Paper: EDIT, arXiv:2504.06738; norms: Vision Transformers Need Registers, arXiv:2309.16588.
    Departs from the papers: the thresholds are ours.
    """
    if outlier <= 1:
        raise BadInput(f"outlier={outlier} must be above 1, a multiple of the median norm.")
    vit = host(model)
    with untouched(model), Trace(vit, ["blocks.*.attn.weights", "blocks.*.resid_post"]) as trace:
        model(images)
    return [
        _row(
            depth,
            trace[f"blocks.{depth}.attn.weights"].float(),
            trace.layouts[f"blocks.{depth}.attn.weights"],
            trace[f"blocks.{depth}.resid_post"].float(),
            trace.layouts[f"blocks.{depth}.resid_post"],
            outlier,
        )
        for depth in range(len(vit.blocks))
    ]


def _row(
    depth: int, weights: Tensor, layout: TokenLayout, tokens: Tensor, after: TokenLayout, outlier: float
) -> SinkRow:
    num_prefix = layout.num_prefix
    if weights.ndim != 4 or weights.shape[-1] != weights.shape[-2]:
        raise BadInput(f"blocks.{depth} attends by weights of shape {tuple(weights.shape)}, not (B, H, n, n).")
    rows = weights.mean(1)[:, num_prefix:]
    real = torch.ones(rows.shape[:2], device=rows.device) if layout.valid is None else layout.valid.float()
    count = real.sum(1, keepdim=True)
    mass = (rows * real.unsqueeze(-1)).sum(1) / count
    patches = mass[:, num_prefix:] * count
    to_class = mass[:, layout.prefix_slice("class")].sum(1) if "class" in dict(layout.prefix) else mass.new_zeros(1)
    norms = tokens[:, after.num_prefix :].norm(dim=-1)
    if after.valid is not None:
        norms = norms.masked_fill(~after.valid, float("nan"))
    return SinkRow(
        depth=depth,
        class_mass=float(to_class.mean()),
        max_patch=float(patches.amax(1).mean()),
        num_sinks=float((patches > SINK).sum(1).float().mean()),
        num_outliers=float((norms > outlier * norms.nanmedian(1, keepdim=True).values).sum(1).float().mean()),
    )


@torch.no_grad()
def sequential_maps(model: nn.Module, images: Tensor) -> Tensor:
    """What the decoder of an EDIT model looks at, layer by layer: (B, L, H, N) over the patches, each map sums to 1.

    Merged tokens share their attention evenly among their patches, so N is always the grid's; lay a map out with
    ``maps.unflatten(-1, grid)``.

    Args:
        model: an EDIT model, or a host with the read-out ``edit``, or a wrapper; left as found.
        images: (B, C, H, W) in [0, 1].

    Raises: BadInput if the host is not read by an EDIT decoder.
    Paper: EDIT, arXiv:2504.06738.
    """
    vit = host(model)
    decoder = vit.read_out
    if not isinstance(decoder, EDITDecoder):
        reader = "its class token or the mean of its tokens" if decoder is None else type(decoder).__name__
        raise BadInput(f"Sequential maps are those of an EDIT decoder, but this model is read by {reader}.")
    with untouched(model):
        states: list[tuple[Tensor, TokenLayout]] = []
        vit.run(*vit.embed(to_model_space(model, images)), states)
        maps = decoder.maps(states, vit.blocks)
    layouts = [layout for _, layout in decoder.read(states)]
    return torch.stack([_spread(weights, layout) for weights, layout in zip(maps, layouts)], dim=1)


def _spread(weights: Tensor, layout: TokenLayout) -> Tensor:
    """(B, H, N) over rows → (B, H, N_1) over the patches of the grid."""
    if layout.sizes is not None:
        weights = weights / layout.sizes[:, None].clamp(min=1)
    return layout.unmerge(weights.transpose(1, 2)).transpose(1, 2)
