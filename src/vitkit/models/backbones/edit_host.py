"""EDIT: the host without class token, read by a decoder that follows its blocks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import cfg, create
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.readouts.edit import DecoderLayer, EDITDecoder, States, require_plain
from vitkit.models.presets import default_patch
from vitkit.models.rehost import adopt
from vitkit.models.swap import spec_of
from vitkit.models.vit import ViT

__all__ = ["EDIT"]


class EDIT(ViT):
    """Encoder of patches and a decoder that carries the class token: ``logits = Linear(LN(c_L))``.

    The host without class token and with :class:`~vitkit.models.parts.readouts.edit.EDITDecoder` as its read-out; the
    final norm and the head are the host's own. Features are the decoder's state, then the encoder's tokens.

    Args:
        share: "none": decoder layers with own weights, which doubles the parameters of the blocks. "attn": the norm
            and the attention of the block, the rest own. "all": every weight of the block.
        align: "post": layer ℓ reads the output of block ℓ; "pre": its input, so that nothing reads the last output.
        init_values: start of LayerScale in both; None: no LayerScale. drop_path_rate: of both, growing linearly.
        others: timm's arguments for the host (``img_size``, ``embed_dim``, ``depth``, …).

    Shape: (B, C, H, W) → (B, num_classes).
    Raises: UnknownName for another ``share`` or ``align``; BadInput if a class token is asked for.
    Paper: EDIT: Enhancing Vision Transformers by Mitigating Attention Sink through an Encoder-Decoder Architecture,
        arXiv:2504.06738. Its recipe is DeiT III's: 3-Augment, binary cross-entropy, LAMB, LayerScale 1e-4.
    Departs from the paper: see the decoder. Sizes are those of DeiT III.
    """

    def __init__(
        self,
        *args: Any,
        share: str = "none",
        align: str = "post",
        init_values: float | None = None,
        drop_path_rate: float = 0.0,
        **others: Any,
    ) -> None:
        if others.pop("class_token", False) or others.pop("global_pool", "token") not in ("token", "avg", ""):
            raise BadInput(
                "EDIT has its class token in the decoder and reads nothing else; leave out class_token and global_pool."
            )
        super().__init__(
            *args,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            init_values=init_values,
            drop_path_rate=drop_path_rate,
            **others,
        )
        spec = spec_of(self, 0)
        self.read_out = EDITDecoder(
            spec.dim, spec.num_blocks, spec.num_heads, None, spec.mlp_ratio, share, align, init_values, drop_path_rate
        )

    @classmethod
    def from_vit(cls, model: nn.Module, share: str = "all", align: str = "pre") -> EDIT:
        """Convert a ViT that is read at its class token; the model itself is left as it is.

        The encoder keeps all weights, the state starts as the class token with its position, and decoder layers start
        as copies of the blocks they follow. Registers stay in the encoder, their positions added to them; the decoder
        does not read them. With ``share="all", align="pre"`` and no registers the result computes what the ViT does
        when no token may attend to the class token.

        Args:
            model: a ViT of timm or Hugging Face, or a wrapper around a host (which is not kept).
            share, align: as above.

        Raises: BadInput if the model has no class token or does not read it, has a distillation token, or holds parts
            that a decoder cannot follow.
        """
        from vitkit.anatomy.host import find_host
        from vitkit.models.rehost import rehost

        distilled = [n for n, _ in model.named_parameters() if "dist_token" in n or "distillation_token" in n]
        if distilled:
            raise BadInput(f"EDIT has one state, but this model has a distillation token ({distilled[0]}) as well.")
        source = find_host(model) or rehost(model)
        _require_class_readout(source)
        new = adopt(cls, copy.deepcopy(source))
        with torch.no_grad():
            state = new.get_parameter("cls_token").detach().clone()
            if new.pos_embed is not None and not new.no_embed_class:
                table, regs = new.pos_embed.detach(), new.num_reg_tokens
                state = state + table[:, :1]
                if regs:
                    new.reg_token = nn.Parameter(new.reg_token + table[:, 1 : 1 + regs])
                new.pos_embed = nn.Parameter(table[:, 1 + regs :].clone())
            # the host norms the tokens before the first block, row by row
            state = new.norm_pre(state)
        new.cls_token, new.has_class_token, new.no_embed_class = None, False, True
        new.num_prefix_tokens -= 1
        new.global_pool = "avg"
        spec = spec_of(new, 0)
        decoder = EDITDecoder(spec.dim, spec.num_blocks, spec.num_heads, None, 1.0, share, align)
        if share != "all":
            decoder.layers = nn.ModuleList(DecoderLayer.like(block, share == "none") for block in new.blocks)
        decoder.state = nn.Parameter(state)
        new.read_out = decoder.to(state.device).train(new.training)
        return new

    # -- forward -----------------------------------------------------------------------------------------------------

    def run(self, x: Tensor, layout: TokenLayout, states: States | None = None):
        if states is not None and not states:
            # a decoder may read the tokens before the first block
            states.append((x, layout))
        return super().run(x, layout, states)

    def readout(self, x: Tensor, layout: TokenLayout, states: States | None = None) -> Tensor:
        """Outputs of all blocks → logits; ``states`` is the list that :meth:`run` filled."""
        if not isinstance(self.read_out, EDITDecoder):
            return super().readout(x, layout, states)
        if states is None:
            raise BadInput("EDIT reads every block; call run(x, layout, states) with a list and hand it to readout.")
        state = self.norm(self.read_out.decode(states, self.blocks).unsqueeze(1))
        if layout.tap is not None:
            state = layout.tap("final_norm", state, None, layout)
        logits = self._classify(state)
        return layout.tap("logits", logits, None, layout) if layout.tap is not None else logits

    def final_features(self, tokens: Tensor, states: States | None) -> Tensor:
        """The decoder's state, registers and patches, normalised: (B, 1+P+N, D)."""
        if not isinstance(self.read_out, EDITDecoder) or states is None:
            return super().final_features(tokens, states)
        state = self.read_out.decode(states, self.blocks)
        return self.norm(torch.cat([state.unsqueeze(1), tokens], dim=1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if not isinstance(self.read_out, EDITDecoder):
            return super().forward_head(x, pre_logits)
        return self._classify(x, pre_logits)

    def _classify(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.fc_norm(x[:, 0]))
        return x if pre_logits else self.head(x)

    # -- timm's handles ----------------------------------------------------------------------------------------------

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for ``num_classes`` classes, 0 for none; the decoder stays the read-out."""
        super().reset_classifier(num_classes)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last one of ``indices``, and with the head the decoder."""
        if prune_head:
            self.read_out = None
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"read_out.state"}


def _require_class_readout(vit: ViT) -> None:
    if type(vit) is not ViT:
        raise BadInput(f"EDIT.from_vit converts a plain ViT, not {type(vit).__name__}.")
    if not vit.has_class_token or vit.global_pool != "token" or vit.attn_pool is not None:
        raise BadInput(
            "EDIT.from_vit starts the decoder with the class token that a model is read at, and this one has "
            f"class_token={vit.has_class_token}, global_pool={vit.global_pool!r}; use a model with global_pool='token' "
            "or put readout='edit' into one without class token."
        )
    if vit.num_prefix_tokens != 1 + vit.num_reg_tokens:
        raise BadInput(
            f"EDIT.from_vit knows a class token and {vit.num_reg_tokens} registers, but this model has "
            f"{vit.num_prefix_tokens} prefix tokens; distillation tokens are not supported."
        )
    parts = {"position": vit.position, "readout": vit.read_out}
    taken = [f"{slot} ({type(part).__name__})" for slot, part in parts.items() if part is not None]
    if taken:
        raise BadInput(f"EDIT.from_vit needs the host's own positions and read-out; undo the swap of {taken[0]} first.")
    for i, block in enumerate(vit.blocks):
        require_plain(block, f"blocks.{i}", "weights of the blocks")


default_cfgs = generate_default_cfgs(
    {
        "edit_femto": cfg(input_size=(3, 32, 32), first_conv="patch_embed.proj", fixed_input_size=True),
        "edit_tiny": cfg(first_conv="patch_embed.proj", fixed_input_size=True),
        "edit_small": cfg(first_conv="patch_embed.proj", fixed_input_size=True),
        "edit_base": cfg(first_conv="patch_embed.proj", fixed_input_size=True),
    }
)


@register_model
def edit_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels: 64 wide, 4 blocks."""
    size = to_2tuple(kwargs.get("img_size") or 32)
    sizes = {"img_size": 32, "patch_size": default_patch(size), "embed_dim": 64, "depth": 4, "num_heads": 4}
    # Xavier matrices: the usual normal(0, 0.02) start learns several times slower at this width
    return _create("edit_femto", pretrained, {**sizes, "mlp_ratio": 2.0, "weight_init": "jax"}, kwargs)


@register_model
def edit_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """DeiT III tiny as the encoder: 192 wide, 12 blocks."""
    return _create("edit_tiny", pretrained, {**_PAPER, "embed_dim": 192, "num_heads": 3}, kwargs)


@register_model
def edit_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """DeiT III small as the encoder: 384 wide, 12 blocks."""
    return _create("edit_small", pretrained, {**_PAPER, "embed_dim": 384, "num_heads": 6}, kwargs)


@register_model
def edit_base(pretrained: bool = False, **kwargs: Any) -> Any:
    """DeiT III base as the encoder: 768 wide, 12 blocks."""
    return _create("edit_base", pretrained, {**_PAPER, "embed_dim": 768, "num_heads": 12}, kwargs)


_PAPER: dict[str, Any] = {"patch_size": 16, "depth": 12, "no_embed_class": True, "init_values": 1e-4}


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    return create(EDIT, variant, pretrained, defaults, kwargs, out_indices=3)
