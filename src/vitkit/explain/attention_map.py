"""Raw attention of one block: the baseline every attention explainer must beat."""

from __future__ import annotations

from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.explain.attention_flow import fuse_heads, read_map, trace_attention, unit_vectors
from vitkit.explain.base import Explanation, in_chunks


def attention_map(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    layer: int = -1,
    head_fusion: str = "mean",
    chunk: int = 32,
) -> Explanation:
    """What the class token attends to in one block (patch tokens on average if the model does not read a class token).

    Args:
        model: a classifier on images in [0, 1] that holds a plain ViT.
        images: (B, C, H, W).
        target: (B,) or one index, None is the predicted class; recorded only, attention is the same for all classes.
        layer: index of the block, negative from the end.
        head_fusion: "mean", "max" or "min" over heads.
        chunk: images at a time.

    Returns: an explanation with ``per_head`` maps. A merged token's attention is shared equally by its patches.
    Raises: as :func:`~vitkit.explain.rollout.rollout`; BadInput if there is no such block.
    """

    def explain(part: Tensor, chosen: Tensor | int | None) -> Explanation:
        seen = trace_attention(model, part, chosen)
        if not -len(seen.weights) <= layer < len(seen.weights):
            raise BadInput(f"layer={layer}: the model has blocks 0…{len(seen.weights) - 1}.")
        attention, layout = seen.weights[layer], seen.layouts[layer]
        batch, _, rows, _ = attention.shape
        spread = unit_vectors(layout, batch, rows - layout.num_prefix, attention.device)
        return Explanation(
            map=read_map(fuse_heads(attention, head_fusion) @ spread, layout, seen.reads_class),
            target=seen.target,
            per_head=read_map(attention @ spread.unsqueeze(1), layout, seen.reads_class),
            meta={"layer": layer % len(seen.weights), "head_fusion": head_fusion},
        )

    return in_chunks(explain, images, target, chunk)
