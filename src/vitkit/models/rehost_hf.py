"""Hugging Face vision transformers as hosts: found by structure, since names differ between versions."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from timm.layers import LayerNorm, QuickGELU
from timm.models.eva import Eva
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.rehost_eva import EvaViT, from_eva
from vitkit.models.vit import ViT

# (pattern of the Hugging Face key below the vision tower, name in the host); old and new spellings alike
_NAMES: tuple[tuple[str, str], ...] = (
    (r"embeddings\.(cls_token|class_embedding)", "cls_token"),
    (r"embeddings\.(distillation_token|register_tokens)", "reg_token"),
    (r"embeddings\.(position_embeddings|position_embedding\.weight)", "pos_embed"),
    (r"embeddings\.(patch_embeddings\.projection|patch_embedding)\.(?P<p>weight|bias)", "patch_embed.proj.{p}"),
    (r"pre_layrnorm\.(?P<p>weight|bias)", "norm_pre.{p}"),
    (r"(layernorm|post_layernorm)\.(?P<p>weight|bias)", "norm.{p}"),
    (r"(encoder\.)?layers?\.(?P<l>\d+)\.(layernorm_before|layer_norm1|norm1)\.(?P<p>\w+)", "blocks.{l}.norm1.{p}"),
    (r"(encoder\.)?layers?\.(?P<l>\d+)\.(layernorm_after|layer_norm2|norm2)\.(?P<p>\w+)", "blocks.{l}.norm2.{p}"),
    (
        r"(encoder\.)?layers?\.(?P<l>\d+)\.(attention\.attention|attention|self_attn)\.(query|q_proj)\.(?P<p>\w+)",
        "blocks.{l}.attn.q.{p}",
    ),
    (
        r"(encoder\.)?layers?\.(?P<l>\d+)\.(attention\.attention|attention|self_attn)\.(key|k_proj)\.(?P<p>\w+)",
        "blocks.{l}.attn.k.{p}",
    ),
    (
        r"(encoder\.)?layers?\.(?P<l>\d+)\.(attention\.attention|attention|self_attn)\.(value|v_proj)\.(?P<p>\w+)",
        "blocks.{l}.attn.v.{p}",
    ),
    (
        r"(encoder\.)?layers?\.(?P<l>\d+)\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.(?P<p>\w+)",
        "blocks.{l}.attn.proj.{p}",
    ),
    (r"(encoder\.)?layers?\.(?P<l>\d+)\.(intermediate\.dense|mlp\.fc1)\.(?P<p>\w+)", "blocks.{l}.mlp.fc1.{p}"),
    (r"(encoder\.)?layers?\.(?P<l>\d+)\.(output\.dense|mlp\.fc2)\.(?P<p>\w+)", "blocks.{l}.mlp.fc2.{p}"),
    (r"(encoder\.)?layers?\.(?P<l>\d+)\.layer_scale(?P<i>[12])\.lambda1", "blocks.{l}.ls{i}.gamma"),
    (r"classifier\.(?P<p>weight|bias)", "head.{p}"),
)
# DINOv3: rotary positions, separate projections, LayerScale, plain or gated MLP
_DINOV3_NAMES: tuple[tuple[str, str], ...] = (
    (r"embeddings\.patch_embeddings\.(?P<p>weight|bias)", "patch_embed.proj.{p}"),
    (r"norm\.(?P<p>weight|bias)", "norm.{p}"),
    (r"(model\.)?layer\.(?P<l>\d+)\.(?P<n>norm[12])\.(?P<p>\w+)", "blocks.{l}.{n}.{p}"),
    (r"(model\.)?layer\.(?P<l>\d+)\.attention\.(?P<n>[qkv]_proj)\.(?P<p>\w+)", "blocks.{l}.attn.{n}.{p}"),
    (r"(model\.)?layer\.(?P<l>\d+)\.attention\.o_proj\.(?P<p>\w+)", "blocks.{l}.attn.proj.{p}"),
    (r"(model\.)?layer\.(?P<l>\d+)\.layer_scale(?P<i>[12])\.lambda1", "blocks.{l}.ls{i}.gamma"),
    (r"(model\.)?layer\.(?P<l>\d+)\.mlp\.gate_proj\.(?P<p>\w+)", "blocks.{l}.mlp.fc1_g.{p}"),
    (r"(model\.)?layer\.(?P<l>\d+)\.mlp\.up_proj\.(?P<p>\w+)", "blocks.{l}.mlp.{up}.{p}"),
    (r"(model\.)?layer\.(?P<l>\d+)\.mlp\.down_proj\.(?P<p>\w+)", "blocks.{l}.mlp.fc2.{p}"),
)
# weights that play no role in the hidden states: pooling heads, and what only pretraining uses
_IGNORED = re.compile(
    r"^(embeddings\.(mask_token|position_ids)|rope_embeddings\.\w+|pooler\..*|head\..*|visual_projection\..*|decoder\..*)$"
)
_ACTIVATIONS: dict[str, Any] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_pytorch_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "gelu_new": functools.partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def from_transformers(model: nn.Module, check: bool = True) -> ViT:
    """Re-host a transformers ViT, DeiT, DINOv2 (with or without registers), DINOv3, CLIP or SigLIP vision model.

    q, k and v are fused into one projection (a copy), except in DINOv3; every other tensor is shared. A linear
    classifier on the class token comes along, other heads do not: ``num_classes`` is then 0.

    Raises:
        BadInput: weights that the host has no place for (a gated MLP of DINOv2, relative positions …), named; a pooling
            head that the logits need.
        RuntimeError: the hidden states or logits differ by more than 1e-5.
    """
    config = getattr(model.config, "vision_config", model.config)
    if config.model_type == "dinov3_vit":
        vit: ViT = _dinov3(model, config)
        if check:
            _compare(model, vit, False)
        return vit
    names, unknown = _translated(model, _NAMES)
    if unknown or "patch_embed.proj.weight" not in names or "pos_embed" not in names:
        raise BadInput(
            f"{type(model).__name__} has weights the host has no place for ({', '.join(unknown[:3]) or 'no plain '}"
            "patch embedding and position table); plain ViT, DeiT, DINOv2, DINOv3, CLIP and SigLIP vision models are "
            "covered."
        )
    vit = _build(names, config)
    vit.load_state_dict(_fused(names, vit), assign=True)
    vit.train(model.training)
    if check:
        _compare(model, vit, "head.weight" in names)
    return vit


def _tower(model: nn.Module) -> dict[str, Tensor]:
    """The state of the vision tower, with the path to it cut off."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    root = next((k[: k.index("embeddings.patch_emb")] for k in state if "embeddings.patch_emb" in k), None)
    if root is None:
        raise BadInput(f"{type(model).__name__} has no patch embedding; it is no vision transformer the host knows.")
    inside = {k.removeprefix(root): v for k, v in state.items() if k.startswith(root)}
    return inside | {k: v for k, v in state.items() if not k.startswith(root) and k.startswith("classifier.")}


def _translated(
    model: nn.Module, table: tuple[tuple[str, str], ...], **words: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Host name → tensor of the vision tower, and the names that ``table`` does not know."""
    names, unknown = {}, []
    for key, value in _tower(model).items():
        target = _translate(key, table, words)
        if target is None and not _IGNORED.match(key):
            unknown.append(key)
        elif target is not None:
            names[target] = value
    return names, unknown


def _translate(key: str, table: tuple[tuple[str, str], ...], words: dict[str, str]) -> str | None:
    for pattern, name in table:
        if match := re.fullmatch(pattern, key):
            return name.format(**match.groupdict(), **words)
    return None


def _dinov3(model: nn.Module, config: Any) -> EvaViT:
    """timm's architecture around the very tensors of ``model``: nothing has to be fused."""
    gated = bool(config.use_gated_mlp)
    names, unknown = _translated(model, _DINOV3_NAMES + _NAMES[:2], up="fc1_x" if gated else "fc1")
    if unknown:
        raise BadInput(
            f"{type(model).__name__} has weights the host has no place for ({', '.join(unknown[:3])}); re-host the "
            "base model instead, e.g. rehost(model.base_model), and train a head of your own."
        )
    eva = Eva(
        img_size=_pair(config.image_size),
        patch_size=_pair(config.patch_size),
        in_chans=config.num_channels,
        num_classes=0,
        global_pool="token",
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        qkv_fused=False,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        swiglu_mlp=gated,
        # the separate projections of gate and values
        swiglu_align_to=int(gated),
        norm_layer=functools.partial(LayerNorm, eps=config.layer_norm_eps),
        init_values=config.layerscale_value,
        num_reg_tokens=config.num_register_tokens,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=config.rope_theta,
        rope_rotate_half=True,
        rope_shift_coords=config.pos_embed_shift,
        rope_jitter_coords=config.pos_embed_jitter,
        rope_rescale_coords=config.pos_embed_rescale,
        dynamic_img_size=True,
    )
    vit = from_eva(eva)
    for block in vit.blocks:
        block.mlp.act = _activation(config)  # type: ignore[union-attr]
    for name in dict(vit.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if name not in names and leaf != "bias":
            raise BadInput(f"The checkpoint lacks {name}.")
        vit.get_submodule(owner).register_parameter(leaf, names.pop(name, None))  # type: ignore[arg-type]
    for name, value in names.items():
        owner, _, leaf = name.rpartition(".")
        # biases that timm's class leaves out, and registers of which there are none
        if value.numel():
            vit.get_submodule(owner).register_parameter(leaf, value)  # type: ignore[arg-type]
    return vit.train(model.training)


def _pair(size: Any) -> Any:
    return tuple(size) if isinstance(size, (list, tuple)) else size


def _activation(config: Any) -> nn.Module:
    name = str(getattr(config, "hidden_act", "gelu"))
    if name not in _ACTIVATIONS:
        raise BadInput(f"The activation {name!r} is not covered; known are {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]()


def _build(names: dict[str, Tensor], config: Any) -> ViT:
    dim = names["patch_embed.proj.weight"].shape[0]
    depth = 1 + max(int(k.split(".")[1]) for k in names if k.startswith("blocks."))
    _activation(config)
    head = names.get("head.weight")
    if head is not None and head.shape[1] != dim:
        raise BadInput(
            f"The classifier takes {head.shape[1]} features where a token has {dim} (class token and mean of patches); "
            "re-host the base model instead, e.g. rehost(model.base_model), and train a head of your own."
        )
    class_token = "cls_token" in names
    return ViT(
        img_size=_pair(config.image_size),
        patch_size=_pair(config.patch_size),
        in_chans=names["patch_embed.proj.weight"].shape[1],
        num_classes=0 if head is None else head.shape[0],
        embed_dim=dim,
        depth=depth,
        num_heads=config.num_attention_heads,
        mlp_ratio=names["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        qkv_bias="blocks.0.attn.q.bias" in names,
        init_values=1.0 if "blocks.0.ls1.gamma" in names else None,
        class_token=class_token,
        reg_tokens=names["reg_token"].shape[1] if "reg_token" in names else 0,
        global_pool="token" if class_token else "avg",
        # the last norm comes before the pooling in all of them
        fc_norm=False,
        pre_norm="norm_pre.weight" in names,
        norm_layer=functools.partial(LayerNorm, eps=config.layer_norm_eps),
        act_layer=_ACTIVATIONS[str(getattr(config, "hidden_act", "gelu"))],
        weight_init="skip",
    )


def _fused(names: dict[str, Tensor], vit: ViT) -> dict[str, Tensor]:
    out = {k: v for k, v in names.items() if not re.search(r"\.attn\.[qkv]\.", k)}
    for i in range(len(vit.blocks)):
        for kind in ("weight", "bias"):
            parts = [names.get(f"blocks.{i}.attn.{x}.{kind}") for x in "qkv"]
            if all(p is not None for p in parts):
                out[f"blocks.{i}.attn.qkv.{kind}"] = nn.Parameter(torch.cat(parts).detach())  # type: ignore[arg-type]
    table = out["pos_embed"]
    table = table if table.ndim == 3 else table.unsqueeze(0)
    missing = vit.pos_embed.shape[1] - table.shape[1]  # type: ignore[union-attr]
    if missing:
        # registers join after the positions were added, which is the same as positions of zero
        start = int(vit.has_class_token)
        zeros = table.new_zeros(1, missing, table.shape[2])
        table = torch.cat([table[:, :start], zeros, table[:, start:]], dim=1)
    out["pos_embed"] = nn.Parameter(table.detach()) if table is not out["pos_embed"] else table
    if "cls_token" in out:
        out["cls_token"] = nn.Parameter(out["cls_token"].detach().reshape(1, 1, -1))
    own = vit.state_dict()
    for key, value in own.items():
        # CLIP's patch projection has no bias, and neither has the host's with pre_norm; anything else must be there
        if key not in out:
            raise BadInput(f"The checkpoint lacks {key} (shape {tuple(value.shape)}).")
    return {k: v for k, v in out.items() if k in own}


@torch.no_grad()
def _compare(model: nn.Module, vit: ViT, has_head: bool, tolerance: float = 1e-5) -> None:
    from vitkit.anatomy.untouched import untouched

    parameter = next(model.parameters())
    size = vit.patch_embed.img_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, vit.in_chans, *size, generator=generator).to(parameter.device, parameter.dtype)
    with untouched(model), untouched(vit):
        theirs = model(pixel_values=images, output_hidden_states=True)
        states: list[tuple[Tensor, Any]] = []
        x, layout = vit.embed(images)
        embedded = x
        x, layout = vit.run(x, layout, states)
        pairs = []
        hidden = getattr(theirs, "hidden_states", None)
        if hidden is not None and len(hidden) == len(states) + 1:
            # the last one may or may not be normalised already; it is compared below
            pairs = list(zip(hidden[:-1], [embedded, *(s for s, _ in states[:-1])]))
        if has_head:
            pairs.append((theirs.logits, vit(images)))
        else:
            last = theirs.last_hidden_state
            options = [vit.norm(x), x]
            pairs.append((last, min(options, key=lambda o: float((o - last).abs().max()))))
    gap = max(float((a - b).abs().max()) for a, b in pairs)
    if parameter.dtype == torch.float32 and not gap <= tolerance * max(1.0, float(pairs[-1][0].abs().max())):
        raise RuntimeError(
            f"The re-hosted {type(model).__name__} differs from the original by {gap:.2e} (allowed: {tolerance}). This "
            "version of transformers computes something the host does not know; please report it."
        )
