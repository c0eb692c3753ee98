"""A decoder that carries the class token past the blocks of an encoder of patches alone."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerScale, calculate_drop_path_rates
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown
from vitkit.models.cross_attention import CrossAttention
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Attention, Block, call

# B batch · H heads · D width · L blocks · P prefix tokens · N patches

SHARE = ("none", "attn", "all")
ALIGN = ("post", "pre")
States = list[tuple[Tensor, TokenLayout]]


class EDITDecoder(nn.Module):
    """EDIT's decoder: one state c, learned at the start, cross-attends to the patches of every block in turn.

    For ℓ = 1 … L: ``u = c_{ℓ−1} + ls₁·CA(q = LN₁(c_{ℓ−1}), kv = LN₁(X̂_ℓ))``, ``c_ℓ = u + ls₂·MLP(LN₂(u))``, where
    X̂_ℓ is the output X_ℓ of block ℓ ("post") or its input X_{ℓ−1} ("pre"). Patches never see c. Registers are not
    read, nor is padding; a merged token counts as often as the patches it stands for. As a part this has a norm and a
    classifier of its own in place of the host's; in :class:`vitkit.models.backbones.edit_host.EDIT` the host's are
    used, and weights may be shared with its blocks.

    The state is a single query, so its own arithmetic is 1/N of a block's; keys and values of the patches cost 2·N·D²
    multiplications a layer on top.

    Args:
        dim: D. depth: L. num_heads: H.
        num_classes: of the own classifier, 0 for none; None: no own norm and classifier.
        mlp_ratio: hidden width of the MLP over D.
        share: "none": own weights in every layer. "attn": norm1 and attention of the block, the rest own. "all":
            every weight of the block. The last two need the blocks: see ``EDIT``.
        align: "post" or "pre"; the latter needs the tokens before the first block, see ``EDIT``, and leaves the
            output of the last one unread.
        init_values: start of LayerScale; None: no LayerScale.
        drop_path_rate: stochastic depth of the last layer, growing linearly.

    Shape: states [(x (B, P+N, D), layout), …] of the L blocks → logits (B, K).
    Raises: UnknownName for another ``share`` or ``align``; BadInput on a host with class token, or without what
        ``share`` and ``align`` need.
    Paper: EDIT: Enhancing Vision Transformers by Mitigating Attention Sink through an Encoder-Decoder Architecture,
        arXiv:2504.06738.
    Departs from the paper: known by its abstract. "post" as the default, the switch for sharing, and an MLP after
        every cross-attention are ours.
    """

    slot = "readout"
    preserves = "none"
    wants_states = True
    # the host's final norm and head are not read
    no_gradient = ("norm.weight", "norm.bias", "head.weight", "head.bias")

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        num_classes: int | None,
        mlp_ratio: float = 4.0,
        share: str = "none",
        align: str = "post",
        init_values: float | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        for what, value, allowed in (("share", share, SHARE), ("align", align, ALIGN)):
            if value not in allowed:
                raise unknown(what, value, allowed, "vitkit show edit")
        self.share, self.align, self.depth = share, align, depth
        self.state = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        rates = cast("list[float]", calculate_drop_path_rates(drop_path_rate, depth))
        hidden = int(dim * mlp_ratio)
        # with "all" the layers are the blocks themselves
        self.layers = nn.ModuleList(
            DecoderLayer.fresh(dim, num_heads, hidden, share == "none", init_values, rate)
            for rate in ([] if share == "all" else rates)
        )
        self.norm: nn.Module = nn.Identity() if num_classes is None else nn.LayerNorm(dim, eps=1e-6)
        self.fc: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        share: str = "none",
        align: str = "post",
        init_values: float | None = None,
        drop_path_rate: float = 0.0,
    ) -> EDITDecoder:
        """The host's classifier reads something else, so ``warm`` changes nothing; ``EDIT.from_vit`` converts a ViT."""
        if share in SHARE[1:] or align in ALIGN[1:]:
            raise BadInput(
                f"share={share!r}, align={align!r} read the weights or the input of the host's blocks, which a part in "
                "a slot does not get; use share='none', align='post' here, or EDIT.from_vit(model, share, align)."
            )
        return cls(
            spec.dim, spec.num_blocks, spec.num_heads, spec.num_classes, spec.mlp_ratio, share, align, init_values,
            drop_path_rate,
        )  # fmt: skip

    def forward(self, states: States, layout: TokenLayout) -> Tensor:
        logits = self.fc(self.norm(self.decode(states)))
        return layout.tap("logits", logits, None, layout) if layout.tap is not None else logits

    def decode(self, states: States, blocks: nn.Module | None = None) -> Tensor:
        """c_L, (B, D).

        Args:
            states: outputs of the L blocks; with align "pre" the tokens before the first block come in front.
            blocks: of the encoder, for shared weights.
        """
        return self._decode(states, blocks, None)

    def maps(self, states: States, blocks: nn.Module | None = None) -> list[Tensor]:
        """Cross-attention weights of every layer, (B, H, N) each; they sum to 1 over the patches."""
        found: list[Tensor] = []
        self._decode(states, blocks, found)
        return found

    def _decode(self, states: States, blocks: nn.Module | None, maps: list[Tensor] | None) -> Tensor:
        read, encoder = self.read(states), self._encoder(blocks)
        state = self.state.expand(read[0][0].shape[0], -1, -1)
        for i, (x, layout) in enumerate(read):
            own: Any = encoder[i] if self.share == "all" else self.layers[i]
            first = own if self.share == "none" else encoder[i]
            # the call points of a shared block are the encoder's
            quiet = layout.replace(tap=None)
            update, weights = _attend(first, state, x, quiet, maps is not None)
            if maps is not None and weights is not None:
                maps.append(weights[:, :, 0])
            state = state + own.drop_path1(own.ls1(update))
            state = state + own.drop_path2(own.ls2(call(own.mlp, own.norm2(state), quiet)))
        return state[:, 0]

    def read(self, states: States) -> States:
        """The L of ``states`` that the layers read."""
        if any(name == "class" for name, _ in states[-1][1].prefix):
            raise BadInput(
                "EDIT keeps the class token out of the encoder, but this host has one among its tokens; build it with "
                "class_token=False, global_pool='avg', or convert it with EDIT.from_vit(model)."
            )
        if len(states) == self.depth + 1:
            return states[:-1] if self.align == "pre" else states[1:]
        if len(states) != self.depth or self.align == "pre":
            wanted = f"{self.depth} blocks" + (" and the tokens before them" if self.align == "pre" else "")
            raise BadInput(
                f"This EDIT decoder with align={self.align!r} reads {wanted}, but got {len(states)} states; collect "
                "them with vit.run(x, layout, states), and rebuild the decoder when blocks were removed."
            )
        return states

    def _encoder(self, blocks: nn.Module | None) -> list[Any]:
        if self.share == "none":
            return []
        encoder: list[Any] = [] if blocks is None else list(blocks.children())
        if len(encoder) != self.depth:
            raise BadInput(
                f"share={self.share!r} needs the {self.depth} blocks of the encoder and got {len(encoder)}; use the "
                "decoder inside an EDIT host."
            )
        for i, block in enumerate(encoder):
            require_plain(block, f"blocks.{i}", f"share={self.share!r}")
        return encoder

    def extra_repr(self) -> str:
        return f"share={self.share!r}, align={self.align!r}"


class DecoderLayer(nn.Module):
    """The modules of one layer of :class:`EDITDecoder`, named as in a block."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)

    @classmethod
    def fresh(
        cls, dim: int, num_heads: int, hidden: int, attention: bool, init_values: float | None, drop_path: float
    ) -> DecoderLayer:
        mlp = TimmMlp(dim, hidden)
        for linear in (mlp.fc1, mlp.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(cast("Tensor", linear.bias))
        modules: dict[str, nn.Module] = {"norm2": nn.LayerNorm(dim, eps=1e-6), "mlp": mlp}
        for i in "12":
            modules[f"ls{i}"] = nn.Identity() if init_values is None else LayerScale(dim, init_values)
            modules[f"drop_path{i}"] = DropPath(drop_path) if drop_path else nn.Identity()
        if attention:
            modules |= {"norm1": nn.LayerNorm(dim, eps=1e-6), "attn": CrossAttention(dim, num_heads)}
        return cls(**modules)

    @classmethod
    def like(cls, block: Any, attention: bool) -> DecoderLayer:
        """Copies of the modules of a block."""
        names = ["norm2", "mlp", "ls1", "ls2", "drop_path1", "drop_path2", *(["norm1"] if attention else [])]
        modules: dict[str, nn.Module] = {name: copy.deepcopy(getattr(block, name)) for name in names}
        if attention:
            modules["attn"] = CrossAttention.like(block.attn, block.attn.qkv.in_features, block.attn.num_heads)
        return cls(**modules)


def require_plain(block: nn.Module, where: str, who: str) -> None:
    """Raise BadInput unless ``block`` is the host's block with standard attention, whose weights a decoder can use."""
    attn = getattr(block, "attn", None)
    if type(block) is not Block or type(attn) is not Attention:
        found = type(block).__name__ if type(block) is not Block else f"a block with {type(attn).__name__}"
    elif attn.normalizer is not None or len(attn.position) or getattr(attn, "gate", None) is not None:
        found = "attention with another normaliser, positions or a gate"
    elif not (block.skip_attn and block.skip_mlp):
        found = "a block without residual connections"
    else:
        return
    raise BadInput(
        f"EDIT with {who} needs standard blocks, but {where} is {found}; undo that swap, or "
        "use share='none' in an edit_* model."
    )


def _attend(
    owner: Any, state: Tensor, x: Tensor, layout: TokenLayout, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Update (B, 1, D) of the state by attention to the patches, and the weights (B, H, 1, N) if asked for."""
    q_tokens, kv_tokens = owner.norm1(state), owner.norm1(x[:, layout.num_prefix :])
    bias = None if layout.sizes is None else layout.sizes.clamp(min=1e-6).log().to(x.dtype)[:, None, None]
    mask = None if layout.valid is None else layout.valid[:, None, None]
    if isinstance(owner.attn, CrossAttention):
        if need_weights:
            return owner.attn(q_tokens, kv_tokens, bias, mask, need_weights=True)
        return owner.attn(q_tokens, kv_tokens, bias, mask), None
    attn: Attention = owner.attn
    q, k, v = _project(attn, q_tokens, kv_tokens)
    logits = None if bias is None else bias.expand(x.shape[0], -1, -1, -1)
    if mask is not None:
        # finite, so that an image of padding alone gives no NaN
        zeros = torch.zeros(mask.shape, dtype=x.dtype, device=x.device) if logits is None else logits
        logits = zeros.masked_fill(~mask, torch.finfo(x.dtype).min)
    weights = None
    if need_weights:
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        weights = (scores if logits is None else scores + logits).softmax(-1)
        z = weights @ v
    else:
        dropout = attn.attn_drop.p if attn.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=logits, dropout_p=dropout)
    return attn.proj_drop(attn.proj(attn.norm(z.transpose(1, 2).flatten(2)))), weights


def _project(attn: Attention, q_tokens: Tensor, kv_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of one set of tokens, keys and values of another, by a fused projection."""
    if type(attn.qkv) is not nn.Linear:
        # a quantized or adapted layer cannot be cut
        return attn.heads(q_tokens)[0], *attn.heads(kv_tokens)[1:]
    width = attn.num_heads * attn.head_dim
    weight, bias = attn.qkv.weight, attn.qkv.bias
    parts = (None, None) if bias is None else (bias[:width], bias[width:])
    q = F.linear(q_tokens, weight[:width], parts[0]).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    k, v = F.linear(kv_tokens, weight[width:], parts[1]).unflatten(-1, (2, attn.num_heads, -1)).unbind(-3)
    return attn.q_norm(q), attn.k_norm(k.transpose(1, 2)), v.transpose(1, 2)
