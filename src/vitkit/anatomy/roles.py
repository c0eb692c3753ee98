"""What each layer of a model is for, whichever library made it."""

from __future__ import annotations

import re

from torch import nn

# (role, pattern of the qualified name): timm and ours, then Hugging Face before and after its v5 renaming
_RULES: tuple[tuple[str, str], ...] = (
    ("patch_embed", r"(^|\.)(patch_embed\.proj|patch_embeddings?\.projection|embeddings\.patch_embedding)$"),
    ("qkv", r"\.(attn|self_attn|attention)\.qkv$"),
    ("q", r"\.(query|q_proj|q_lin)$"),
    ("k", r"\.(key|k_proj|k_lin)$"),
    ("v", r"\.(value|v_proj|v_lin)$"),
    ("gate", r"\.(attn|self_attn)\.gate$"),
    (
        "proj",
        r"\.(attn\.proj|attention\.output\.dense|self_attn\.out_proj|attention\.o_proj|attn\.out_proj)$",
    ),
    ("fc1", r"\.(mlp\.fc1|intermediate\.dense|mlp\.fc1_[gx]|mlp\.gate_proj|mlp\.up_proj|mlp\.w1)$"),
    ("fc2", r"\.(mlp\.fc2|(?<!attention\.)output\.dense|mlp\.down_proj|mlp\.w3)$"),
    ("norm1", r"\.(norm1|layernorm_before|layer_norm1)$"),
    ("norm2", r"\.(norm2|layernorm_after|layer_norm2)$"),
    ("norm", r"(^|\.)(norm|fc_norm|norm_pre|layernorm|post_layernorm|pre_layrnorm)$"),
    ("head", r"(^|\.)(head|head\.fc|classifier|fc)$"),
)
_COMPILED = tuple((role, re.compile(pattern)) for role, pattern in _RULES)


def role_of(name: str) -> str | None:
    """Role of a qualified module name: patch_embed, qkv, q, k, v, gate, proj, fc1, fc2, norm1, norm2, norm, head.

    None for any other name.

    >>> role_of("blocks.3.attn.qkv"), role_of("encoder.layer.0.attention.output.dense"), role_of("layer.0.output.dense")
    ('qkv', 'proj', 'fc2')
    """
    return next((role for role, pattern in _COMPILED if pattern.search(name)), None)


def roles(model: nn.Module) -> dict[str, str]:
    """Qualified name → role, for every layer whose role is known, in forward order of registration."""
    found = ((name, role_of(name)) for name, _ in model.named_modules())
    return {name: role for name, role in found if role is not None}


def linear_groups(block: nn.Module) -> list[list[str]]:
    """Names of the linear layers of one block, as data meets them: [qkv or q, k, v; gate], [proj], [fc1 …], [fc2].

    Linear layers whose role is unknown follow, one group each, so nothing is left out silently.
    """
    order = (("qkv", "q", "k", "v", "gate"), ("proj",), ("fc1",), ("fc2",))
    linears = [name for name, m in block.named_modules() if isinstance(m, nn.Linear)]
    by_role = {name: role_of(f"block.{name}") for name in linears}
    groups = [[name for name in linears if by_role[name] in roles_] for roles_ in order]
    known = {name for group in groups for name in group}
    return [group for group in groups if group] + [[name] for name in linears if name not in known]
