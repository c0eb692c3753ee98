"""timm's ``Eva`` class as a host: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT and timm's own rotary ViTs."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionRope, LayerScale
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.positions.rope import ROPES, Rotary, RotaryTable
from vitkit.models.rehost import adopt, adopt_mlp
from vitkit.models.vit import Attention, Block, ViT

_GAMMA = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}


class EvaViT(ViT):
    """The host around a model of timm's ``Eva`` class: its tensors, its pooling and its rotary positions.

    ``rope`` is timm's rotary module (None without one); every block turns q and k by the
    :class:`~vitkit.models.parts.positions.rope.Rotary` in its ``attn.position``. Parameters have timm's names, except
    that LayerScale is a module here as in every host: ``gamma_1`` is ``ls1.gamma``, ``gamma_2`` is ``ls2.gamma``.
    ``load_state_dict`` takes both spellings, :meth:`timm_state_dict` writes timm's.

    Made by :func:`vitkit.rehost`, not by its constructor.
    """

    rope: nn.Module | None

    init_weights = Eva.init_weights  # type: ignore[assignment]
    _init_weights = Eva._init_weights  # type: ignore[assignment]
    no_weight_decay = Eva.no_weight_decay  # type: ignore[assignment]
    set_input_size = Eva.set_input_size  # type: ignore[assignment]
    prune_intermediate_layers = Eva.prune_intermediate_layers  # type: ignore[assignment]

    def open_slots(self) -> None:
        super().open_slots()
        if not hasattr(self, "rope"):
            self.rope = None

    def start_rotation(self, layout: TokenLayout) -> RotaryTable | None:
        return None if self.rope is None else RotaryTable.start(self.rope, layout)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        Eva.reset_classifier(self, num_classes, global_pool)  # type: ignore[arg-type]
        self.pool_include_prefix = self.attn_pool is not None

    def timm_state_dict(self) -> dict[str, Tensor]:
        """The state dict under timm's own names: ``eva.load_state_dict(vit.timm_state_dict())``."""
        return {_renamed(key, {ours: theirs for theirs, ours in _GAMMA.items()}): t for key, t in _items(self)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [k for k in state_dict if k.startswith(f"{prefix}blocks.")]:
            if (new := _renamed(key, _GAMMA)) != key:
                state_dict[new] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class RotaryAttention(Attention):
    """timm's ``EvaAttention`` or ``AttentionRope`` with the host's slots.

    Its projections stay what they are: one ``qkv`` whose biases ``q_bias`` and ``v_bias`` are parameters beside it (k
    has none), or ``q_proj``, ``k_proj``, ``v_proj``, of which k and v may have fewer heads (grouped queries). Heads of
    k and v are repeated before anything looks at them, so call points, merging and parts see H of each.

    Shape: (B, P+N, D) → (B, P+N, D).
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    q_bias: Tensor | None
    k_bias: Tensor
    v_bias: Tensor
    num_kv_groups: int

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is not None:
            qkv = self.qkv(x)
            if (bias := self._fused_bias()) is not None:
                qkv = qkv + bias
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            layers = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in layers)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.num_kv_groups > 1:
            k, v = (t.repeat_interleave(self.num_kv_groups, dim=1) for t in (k, v))
        return q, k, v

    def _fused_bias(self) -> Tensor | None:
        return None if self.q_bias is None else torch.cat([self.q_bias, self.k_bias, self.v_bias])

    @torch.no_grad()
    def standard(self) -> Attention:
        """The same function with one fused projection and one bias, copied; everything else is shared."""
        new = adopt(Attention, self)
        for name in ("q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias"):
            for where in (new._modules, new._parameters, new._buffers, new.__dict__):
                where.pop(name, None)
        if self.qkv is not None:
            weight, bias = self.qkv.weight, self.qkv.bias if self.q_bias is None else self._fused_bias()
        else:
            weight, bias = self._gathered()
        new.qkv = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        new.qkv.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            new.qkv.bias = nn.Parameter(bias.detach().clone())
        return new

    def _gathered(self) -> tuple[Tensor, Tensor | None]:
        """Weights (3·H·d, D) and biases of q, k and v, the heads of k and v repeated."""
        layers: tuple[nn.Linear, ...] = (self.q_proj, self.k_proj, self.v_proj)
        times = (1, self.num_kv_groups, self.num_kv_groups)

        def repeated(t: Tensor, n: int) -> Tensor:
            return t.unflatten(0, (-1, self.head_dim)).repeat_interleave(n, dim=0).flatten(0, 1)

        weight = torch.cat([repeated(layer.weight, n) for layer, n in zip(layers, times)])
        if all(layer.bias is None for layer in layers):
            return weight, None
        # nn.Linear declares its bias a Tensor, also where it is None
        own: list[Tensor | None] = [layer.bias for layer in layers]
        biases = [layer.weight.new_zeros(layer.out_features) if b is None else b for layer, b in zip(layers, own)]
        return weight, torch.cat([repeated(bias, n) for bias, n in zip(biases, times)])


def from_eva(model: Eva) -> EvaViT:
    """Re-host a model of timm's ``Eva`` class; every tensor is shared with it.

    Covered: axial, mixed, DINOv3 and M-RoPE rotary positions with their training-time augmentation, absolute positions
    or none, class token and registers, fused and separate projections, grouped queries, head dims of any width, q/k
    norms, output norm, gated attention, plain and gated MLPs with or without norm, LayerScale, all poolings.

    Raises: BadInput for a subclass, post-norm blocks, or another attention or rotary class, by name.
    """
    _refuse(model)
    vit = adopt(EvaViT, model)
    vit.has_class_token = model.cls_token is not None
    vit.num_reg_tokens = 0 if model.reg_token is None else model.reg_token.shape[1]
    # the class reads all tokens in its attention pool, where the plain ViT reads patches
    vit.pool_include_prefix = model.attn_pool is not None
    vit.open_slots()
    vit.blocks = nn.Sequential(*[_adopt_block(block, i, model.rope) for i, block in enumerate(model.blocks)])
    return vit.train(model.training)


def _refuse(model: Eva) -> None:
    if type(model) is not Eva:
        raise BadInput(f"{type(model).__name__} changes timm's Eva, and the host does not copy the change.")
    rope = model.rope
    if rope is not None and type(rope).__name__ not in ROPES:
        raise BadInput(f"The rotary embedding {type(rope).__name__} is not covered; known are {', '.join(ROPES)}.")
    for i, block in enumerate(model.blocks):
        if type(block) is EvaBlockPostNorm:
            raise BadInput(
                f"blocks.{i} is an EvaBlockPostNorm, which normalises after attention and MLP (use_post_norm=True); "
                "the host's blocks do before. Take a model without it, such as eva02_large_patch14_clip_224."
            )
        if type(block) is not EvaBlock or type(block.attn) not in (EvaAttention, AttentionRope):
            kinds = f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
            raise BadInput(f"blocks.{i} is a {kinds}; the host covers EvaBlock with EvaAttention or AttentionRope.")


def _adopt_block(block: Any, depth: int, rope: nn.Module | None) -> Block:
    new = Block.__new__(Block)
    nn.Module.__init__(new)
    new.norm1, new.attn = block.norm1, _adopt_attention(block.attn, depth, rope)
    new.ls1, new.drop_path1 = _layer_scale(block.gamma_1), block.drop_path1
    new.norm2, new.mlp = block.norm2, adopt_mlp(block.mlp)
    new.ls2, new.drop_path2 = _layer_scale(block.gamma_2), block.drop_path2
    new.open_slots(depth)
    return new


def _adopt_attention(attn: Any, depth: int, rope: nn.Module | None) -> RotaryAttention:
    new = adopt(RotaryAttention, attn)
    # what only one of the two classes has, or only newer versions
    new.attn_dim = attn.proj.in_features
    new.head_dim = new.attn_dim // attn.num_heads
    new.num_kv_groups = getattr(attn, "num_kv_groups", 1)
    if not hasattr(attn, "q_bias"):
        new.q_bias = None
    new.open_slots(depth)
    if rope is not None:
        new.position.append(Rotary(new.head_dim, getattr(attn, "rotate_half", False), depth))
    return new


def _layer_scale(gamma: nn.Parameter | None) -> LayerScale | nn.Identity:
    if gamma is None:
        return nn.Identity()
    layer = LayerScale(gamma.shape[0], device="meta")
    layer.gamma = gamma
    return layer


def _renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if key.endswith(f".{old}"):
            return key.removesuffix(old) + new
    return key


def _items(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.state_dict().items())
