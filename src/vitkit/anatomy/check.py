"""Is the model still what its own attributes say?"""

from __future__ import annotations

import math

from timm.layers import GluMlp
from torch import nn

from vitkit.anatomy.host import host
from vitkit.models.vit import Attention


def check(model: nn.Module) -> None:
    """Verify heads, scales, widths and grid of the host after a transform.

    Pruning and quantization libraries leave ``attn.scale``, ``num_heads`` or ``embed_dim`` silently wrong.

    Raises: ValueError listing every attribute that disagrees with the weights.
    """
    vit = host(model)
    wrong: list[str] = []
    for i, block in enumerate(vit.blocks):
        attn = getattr(block, "attn", None)
        if not isinstance(attn, Attention):
            continue
        out_features = getattr(attn.qkv, "out_features", 3 * attn.attn_dim)
        if getattr(attn, "q_proj", None) is not None:
            out_features = 3 * attn.q_proj.out_features
        if out_features != 3 * attn.num_heads * attn.head_dim:
            wrong.append(f"blocks.{i}.attn.qkv gives {out_features} features, not 3·{attn.num_heads}·{attn.head_dim}")
        if not math.isclose(attn.scale, attn.head_dim**-0.5, rel_tol=1e-6):
            wrong.append(f"blocks.{i}.attn.scale is {attn.scale:.4g}, not head_dim^-0.5 = {attn.head_dim**-0.5:.4g}")
        if getattr(attn.proj, "in_features", attn.attn_dim) != attn.attn_dim:
            wrong.append(f"blocks.{i}.attn.proj takes {attn.proj.in_features} features, not {attn.attn_dim}")
        if getattr(attn.proj, "out_features", vit.embed_dim) != vit.embed_dim:
            wrong.append(f"blocks.{i}.attn.proj gives {attn.proj.out_features} features, not {vit.embed_dim}")
        fc1, fc2 = getattr(block.mlp, "fc1", None), getattr(block.mlp, "fc2", None)
        halves = 2 if isinstance(block.mlp, GluMlp) else 1
        if isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear) and fc1.out_features != halves * fc2.in_features:
            wrong.append(f"blocks.{i}.mlp: fc1 gives {fc1.out_features} features, fc2 takes {fc2.in_features}")
    if vit.pos_embed is not None:
        # a tokenizer that picks positions itself may have another grid than the table, which stays the host's
        picks = hasattr(vit.patch_embed, "pick_positions")
        grid = getattr(vit.patch_embed, "host_grid", None) or (None if picks else vit.patch_embed.grid_size)
        rows = None if grid is None else math.prod(grid) + (0 if vit.no_embed_class else vit.num_prefix_tokens)
        if rows is not None and vit.pos_embed.shape[1] != rows:
            wrong.append(f"pos_embed has {vit.pos_embed.shape[1]} rows, the grid needs {rows}")
    if wrong:
        raise ValueError("The model contradicts itself: " + "; ".join(wrong) + ".")
