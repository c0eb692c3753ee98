"""The host: timm's ``VisionTransformer`` with every slot open.

Parameter names are timm's, so checkpoints load both ways. What is added: blocks map ``(x, layout) -> (x, layout)``
(see :class:`~vitkit.models.layout.TokenLayout`), the forward is three public calls ``embed``, ``run`` and ``readout``,
attention takes one logit edit built from named contributors, and every call point can be observed or changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, resample_abs_pos_embed
from timm.layers import GluMlp as TimmGluMlp
from timm.layers import Mlp as TimmMlp
from timm.layers import SwiGLU as TimmSwiGLU
from timm.layers.attention import Attention as TimmAttention
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vitkit.models.layout import LogitEdit, Rotation, TokenLayout

# B batch · H heads · P prefix tokens · N patch tokens · D embedding · d = head dim

#: outputs of the blocks, each with its layout
States = list[tuple[Tensor, TokenLayout]]


def call(module: nn.Module, x: Tensor, layout: TokenLayout) -> Tensor:
    """Call a mixer or MLP with the layout if it asks for one (``takes_layout = True``), else with ``x`` alone."""
    return module(x, layout) if getattr(module, "takes_layout", False) else module(x)


class Attention(TimmAttention):
    """Multi-head self-attention whose logits, normaliser and positions are slots.

    ``softmax(q kᵀ/√d + bias) v``: fused while the normaliser is softmax and nobody looks at logits or weights,
    explicit otherwise; both agree to 1e-5 in float32.

    Slots: ``normalizer`` (None is softmax; else a module ``(scores (B,H,n,n), mask) -> (B,H,n,n)``) and ``position``
    (a list of per-block position parts offering ``rotate(q, k, layout)`` and/or ``bias(q, k, layout)``).

    Shape: (B, P+N, D) → (B, P+N, D).
    """

    takes_layout = True
    depth_index: int | None

    def __init__(self, *args: Any, depth: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.open_slots(depth)

    def open_slots(self, depth: int | None) -> None:
        self.depth_index = depth
        self.normalizer: nn.Module | None = None
        self.position = nn.ModuleList()

    def standard(self) -> Attention:
        """The same function with one fused ``qkv`` projection that has its bias: what a part may start from."""
        return self

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, D) → q, k, v of shape (B, H, n, d), after the optional q/k norms."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        q, k, v = self.heads(x)
        return self.attend(q, k, v, x, layout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, layout: TokenLayout) -> Tensor:
        """Everything after the projections: positions, logits, weights, per-head outputs, output projection."""
        tap, depth = layout.tap, self.depth_index
        for part in self.position:
            if hasattr(part, "rotate"):
                q, k = part.rotate(q, k, layout)
        if tap is not None:
            q, k = tap("attn.q", q, depth, layout), tap("attn.k", k, depth, layout)
            v = tap("attn.v", v, depth, layout)
        bias, mask = self.logit_bias(q, k, layout), layout.key_mask()
        if self._needs_weights(layout):
            z = self._explicit(q, k, v, bias, mask, layout)
        else:
            z = self._fused(q, k, v, bias, mask)
        if tap is not None:
            z = tap("attn.z", z.transpose(1, 2), depth, layout).transpose(1, 2)
        out = self.norm(z.transpose(1, 2).flatten(2))
        if getattr(self, "gate", None) is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def logit_bias(self, q: Tensor, k: Tensor, layout: TokenLayout) -> Tensor | None:
        """Sum of the additive contributors: log merge size, per-block positions, named edits; None without any."""
        terms: list[Tensor] = []
        if layout.sizes is not None:
            log_size = layout.sizes.clamp(min=1e-6).log().to(q.dtype)
            terms.append(F.pad(log_size, (layout.num_prefix, 0))[:, None, None, :])
        terms += [part.bias(q, k, layout) for part in self.position if hasattr(part, "bias")]
        terms += [edit.fn(q, k, layout) for edit in layout.edits if edit.kind == "add"]
        if not terms:
            return None
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total.to(q.dtype)

    def _needs_weights(self, layout: TokenLayout) -> bool:
        if self.normalizer is not None or not self.fused_attn:
            return True
        if layout.edits and any(edit.kind == "set" for edit in layout.edits):
            return True
        tap = layout.tap
        return tap is not None and (
            tap.wants("attn.logits", self.depth_index) or tap.wants("attn.weights", self.depth_index)
        )

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        dropout = self.attn_drop.p if self.training else 0.0
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        # a row without any allowed key must give zeros, not NaN: let it see everything, then zero it
        alive = mask.any(-1)
        allowed = (mask | ~alive[:, None])[:, None, None, :]
        if bias is None:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        else:
            merged = bias.masked_fill(~allowed, -math.inf)
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=merged, dropout_p=dropout)
        return z * alive[:, None, None, None]

    def _explicit(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, layout: TokenLayout
    ) -> Tensor:
        tap, depth = layout.tap, self.depth_index
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias
        for edit in layout.edits:
            if edit.kind == "set":
                logits = edit.fn(logits, layout)
        if tap is not None:
            logits = tap("attn.logits", logits, depth, layout)
        if self.normalizer is not None:
            square = None if mask is None else mask[:, None, :, None] & mask[:, None, None, :]
            weights = self.normalizer(logits, square).to(v.dtype)
        elif mask is None:
            weights = logits.softmax(dim=-1)
        else:
            alive = mask.any(-1)
            allowed = (mask | ~alive[:, None])[:, None, None, :]
            weights = logits.masked_fill(~allowed, -math.inf).softmax(dim=-1) * alive[:, None, None, None]
        if tap is not None:
            weights = tap("attn.weights", weights, depth, layout)
        return self.attn_drop(weights) @ v


class Mlp(TimmMlp):
    """timm's two-layer MLP with a call point at its hidden neurons."""

    takes_layout = True
    depth_index: int | None = None

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        hidden = self.norm(self.drop1(self.act(self.fc1(x))))
        if layout.tap is not None:
            hidden = layout.tap("mlp.hidden", hidden, self.depth_index, layout)
        return self.drop2(self.fc2(hidden))


class GluMlp(TimmGluMlp):
    """timm's gated MLP with one projection for gate and values; the call point is at the gated neurons."""

    takes_layout = True
    depth_index: int | None = None

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        first, second = self.fc1(x).chunk(2, dim=-1)
        hidden = first * self.act(second) if self.gate_last else self.act(first) * second
        hidden = self.norm(self.drop1(hidden))
        if layout.tap is not None:
            hidden = layout.tap("mlp.hidden", hidden, self.depth_index, layout)
        return self.drop2(self.fc2(hidden))


class SwiGLU(TimmSwiGLU):
    """timm's gated MLP with two projections (``fc1_g`` gates ``fc1_x``); the call point is at the gated neurons."""

    takes_layout = True
    depth_index: int | None = None

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        hidden = self.norm(self.drop1(self.act(self.fc1_g(x)) * self.fc1_x(x)))
        if layout.tap is not None:
            hidden = layout.tap("mlp.hidden", hidden, self.depth_index, layout)
        return self.drop2(self.fc2(hidden))


class Block(TimmBlock):
    """Pre-norm block ``x ← r_a·x + attn(norm1 x)``, ``x ← r_m·x + mlp(norm2 x)`` on tokens with a layout.

    ``skip_attn`` and ``skip_mlp`` (r_a, r_m; default True) switch the residual connections. ``reduce`` is an optional
    module called between attention and MLP as ``reduce(x, keys, layout) -> (x, layout)`` with the keys (B, H, n, d)
    of this block's attention: the place where token merging happens.

    Shape: (B, P+N, D), layout → (B, P+N', D), layout.
    """

    takes_layout = True
    depth_index: int

    def __init__(self, *args: Any, depth: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, depth=depth, **kwargs)
        self.open_slots(depth)

    def open_slots(self, depth: int) -> None:
        self.depth_index = depth
        self.skip_attn, self.skip_mlp = True, True
        self.reduce: nn.Module | None = None
        for child in (self.attn, self.mlp):
            if isinstance(child, (Attention, Mlp, GluMlp, SwiGLU)):
                child.depth_index = depth

    def forward(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        tap, depth = layout.tap, self.depth_index
        if tap is not None:
            x = tap("resid_pre", x, depth, layout)
        keys = None
        normed = self.norm1(x)
        if self.reduce is not None:
            if not isinstance(self.attn, Attention):
                raise TypeError(
                    f"Block {depth} merges tokens by attention keys, but its mixer is {type(self.attn).__name__}, "
                    "which has none; merge in blocks that keep standard attention."
                )
            q, keys, v = self.attn.heads(normed)
            update = self.attn.attend(q, keys, v, normed, layout)
        else:
            update = call(self.attn, normed, layout)
        update = self.drop_path1(self.ls1(update))
        if tap is not None:
            update = tap("attn.out", update, depth, layout)
        x = x + update if self.skip_attn else update
        if tap is not None:
            x = tap("resid_mid", x, depth, layout)
        if self.reduce is not None:
            x, layout = self.reduce(x, keys, layout)
        update = self.drop_path2(self.ls2(call(self.mlp, self.norm2(x), layout)))
        if tap is not None:
            update = tap("mlp.out", update, depth, layout)
        x = x + update if self.skip_mlp else update
        if tap is not None:
            x = tap("resid_post", x, depth, layout)
        return x, layout


class ViT(VisionTransformer):
    """timm's plain vision transformer with open slots; constructor, attributes and parameter names are timm's.

    Slots and where they live: tokenizer ``patch_embed`` · position ``position`` (model level) and
    ``blocks[i].attn.position`` · mixer ``blocks[i].attn`` · normalizer ``blocks[i].attn.normalizer`` · mlp
    ``blocks[i].mlp`` · norm ``blocks[i].norm1/norm2`` · block ``blocks[i]`` · readout ``read_out`` · head ``head``.
    Use :func:`vitkit.swap` or :func:`vitkit.build` to fill them.

    >>> import torch
    >>> vit = ViT(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=2)
    >>> x, layout = vit.embed(torch.zeros(3, 1, 8, 8))
    >>> x.shape, layout.grid, layout.prefix
    (torch.Size([3, 17, 32]), (4, 4), (('class', 1),))
    >>> vit(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("block_fn", Block)
        kwargs.setdefault("attn_layer", Attention)
        kwargs.setdefault("mlp_layer", Mlp)
        super().__init__(*args, **kwargs)
        self.open_slots()

    def open_slots(self) -> None:
        self.position: nn.Module | None = None
        self.read_out: nn.Module | None = None
        self.taps: tuple[Any, ...] = ()
        self.aux_sink: dict[tuple[str, int], Tensor] | None = None

    # -- three public calls ------------------------------------------------------------------------------------

    def embed(self, images: Tensor, **cond: Any) -> tuple[Tensor, TokenLayout]:
        """Images (B, C, H, W) → tokens (B, P+N, D) with prefix and positions, and their layout."""
        x, layout = self.tokenize(images)
        layout = layout.replace(
            prefix=self._prefix_groups(),
            cond=cond,
            tap=_Taps(self.taps) if self.taps else None,
            rotation=self.start_rotation(layout),
            aux=self.aux_sink if self.aux_sink is not None else {},
        )
        x = self._add_positions(x, layout)
        if self.position is not None:
            x = self.position.embed(x, layout, images)
        x, layout = self._drop_patches(self.pos_drop(x), layout)
        x = self.norm_pre(x)
        if layout.tap is not None:
            x = layout.tap("embed", x, None, layout)
        return x, layout

    def start_rotation(self, layout: TokenLayout) -> Rotation | None:
        """Rotary tables for the tokens of this forward; None in a host that turns nothing."""
        return None

    def tokenize(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        """Images → patch tokens (B, N, D) and a layout without prefix; no positions yet."""
        if getattr(self.patch_embed, "slot", None) == "tokenizer":
            return self.patch_embed(images)
        grid = self.patch_embed.dynamic_feat_size(images.shape[-2:])
        x = self.patch_embed(images)
        return (x.flatten(1, 2) if x.ndim == 4 else x), TokenLayout(grid=tuple(grid))

    def run(self, x: Tensor, layout: TokenLayout, states: States | None = None):
        """All blocks. ``states`` collects the output of every block when a list is given."""
        for block in self.blocks:
            layout = _followed(layout)
            if self.grad_checkpointing and self.training:
                x, layout = checkpoint(_run_block, block, x, layout, use_reentrant=False)
            else:
                x, layout = _run_block(block, x, layout)
            if states is not None:
                states.append((x, layout))
        return x, layout

    def readout(self, x: Tensor, layout: TokenLayout, states: States | None = None) -> Tensor:
        """Tokens after the last block → logits (B, num_classes)."""
        if self.read_out is not None:
            return self.read_out(states if states is not None else [(x, layout)], layout)
        x = self.norm(x)
        if layout.tap is not None:
            x = layout.tap("final_norm", x, None, layout)
        logits = self.head(self.head_drop(self.fc_norm(self.pool_tokens(x, layout))))
        return layout.tap("logits", logits, None, layout) if layout.tap is not None else logits

    # -- timm's contract on the same loop ----------------------------------------------------------------------

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **cond: Any) -> Tensor:
        tokens, layout = self._start(x, attn_mask, is_causal, **cond)
        states: States | None = [] if self._reads_states else None
        tokens, layout = self.run(tokens, layout, states)
        return self.readout(tokens, layout, states)

    @property
    def _reads_states(self) -> bool:
        return getattr(self.read_out, "wants_states", False)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        tokens, layout = self._start(x, attn_mask, is_causal)
        states: States | None = [] if self._reads_states else None
        tokens, layout = self.run(tokens, layout, states)
        return self.final_features(tokens, states)

    def final_features(self, tokens: Tensor, states: States | None) -> Tensor:
        """What ``forward_features`` gives; ``states`` are the outputs of all blocks if the read-out wants them."""
        return self.norm(tokens)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's feature extraction; grids come from the layout, so merged tokens are un-merged first."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is not supported; use 'NCHW' or 'NLC'.")
        take, last = feature_take_indices(len(self.blocks), indices)
        tokens, layout = self._start(x, attn_mask, is_causal)
        maps, prefixes = [], []
        states: States | None = [(tokens, layout)] if self._reads_states else None
        whole = not stop_early or last + 1 == len(self.blocks)
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            tokens, layout = _run_block(block, tokens, _followed(layout))
            if states is not None:
                states.append((tokens, layout))
            if i not in take:
                continue
            out = self.norm(tokens) if norm else tokens
            prefixes.append(out[:, : layout.num_prefix])
            patches = out[:, layout.num_prefix :]
            maps.append(layout.to_grid(patches).contiguous() if output_fmt == "NCHW" else layout.unmerge(patches))
        features = None
        if not intermediates_only:
            # a read-out over all blocks says nothing about some of them
            features = self.final_features(tokens, states) if whole else self.norm(tokens)
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens and self.num_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            if features is not None:
                result["image_features"] = features
            return result
        found: list[Any] = maps
        if return_prefix_tokens and self.num_prefix_tokens:
            found = list(zip(maps, prefixes))
        return found if features is None else (features, found)

    def pool_tokens(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Pool (B, P+N, D) → (B, D) as timm does, but over valid rows and weighted by merge size.

        A merged token counts for all the patches it stands for, so pooling after merging identical tokens equals
        pooling before it.
        """
        if layout.sizes is None and layout.valid is None and layout.num_prefix == self.num_prefix_tokens:
            return self.pool(x)
        if self.global_pool == "token" and self.attn_pool is None:
            return x[:, layout.prefix_slice("class").start]
        if isinstance(self.attn_pool, AttentionPoolLatent) and self.attn_pool.pos_embed is None:
            return self._map_pool(x, layout)
        if self.global_pool != "avg" or self.attn_pool is not None:
            raise ValueError(
                f"global_pool={self.global_pool!r} is not defined on merged or padded tokens; use 'token', 'avg' or "
                "'map'."
            )
        patches = x[:, layout.num_prefix :]
        weight = layout.sizes if layout.sizes is not None else torch.ones_like(patches[..., 0])
        if layout.valid is not None:
            weight = weight * layout.valid
        if self.pool_include_prefix:
            patches, weight = x, F.pad(weight, (layout.num_prefix, 0), value=1.0)
        weight = weight.to(x.dtype).unsqueeze(-1)
        return (patches * weight).sum(1) / weight.sum(1).clamp(min=1e-6)

    def _map_pool(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """timm's attention pooling with log merge sizes in its logits, as in the blocks."""
        skip = 0 if self.pool_include_prefix else layout.num_prefix
        patches = x[:, layout.num_prefix :]
        logits = patches.new_zeros(patches.shape[:2]) if layout.sizes is None else layout.sizes.clamp(min=1e-6).log()
        if layout.valid is not None:
            logits = logits.to(x.dtype).masked_fill(~layout.valid, torch.finfo(x.dtype).min)
        logits = F.pad(logits.to(x.dtype), (layout.num_prefix - skip, 0))
        return self.attn_pool(x[:, skip:], attn_mask=logits[:, None, None, :])

    # -- inside ------------------------------------------------------------------------------------------------

    def _start(
        self, images: Tensor, attn_mask: Tensor | None, is_causal: bool, **cond: Any
    ) -> tuple[Tensor, TokenLayout]:
        x, layout = self.embed(images, **cond)
        edits = layout.edits
        if attn_mask is not None:
            edits += (LogitEdit("attn_mask", "add", lambda q, k, _: _as_bias(attn_mask, q)),)
        if is_causal:
            edits += (LogitEdit("is_causal", "add", lambda q, k, _: _causal_bias(q)),)
        return x, (layout.replace(edits=edits) if edits is not layout.edits else layout)

    def _prefix_groups(self) -> tuple[tuple[str, int], ...]:
        groups = (("class", int(self.has_class_token)), ("register", self.num_reg_tokens))
        return tuple((name, count) for name, count in groups if count)

    def _add_positions(self, x: Tensor, layout: TokenLayout) -> Tensor:
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if self.pos_embed is None:
            return torch.cat([*prefix, x], dim=1) if prefix else x
        table = self._position_table(layout).to(x.dtype)
        if self.no_embed_class or not prefix:
            x = x + table
            return torch.cat([*prefix, x], dim=1) if prefix else x
        return torch.cat([*prefix, x], dim=1) + table

    def _position_table(self, layout: TokenLayout) -> Tensor:
        """(1 or B, P?+N, D) rows of the absolute table for these tokens."""
        table = self.get_parameter("pos_embed")
        num_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        pick = getattr(self.patch_embed, "pick_positions", None)
        if pick is not None:
            # tokenizers with their own token set (multi-scale, packed) pick rows from the table themselves
            patches = pick(table[:, num_prefix:], self.patch_embed.grid_size, layout)
            if not num_prefix:
                return patches
            return torch.cat([table[:, :num_prefix].expand(patches.shape[0], -1, -1), patches], dim=1)
        if tuple(layout.grid) == tuple(self.patch_embed.grid_size):
            return table
        return resample_abs_pos_embed(
            table,
            new_size=list(layout.grid),
            old_size=list(self.patch_embed.grid_size),
            num_prefix_tokens=num_prefix,
        )

    def _drop_patches(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        rate = getattr(self.patch_drop, "prob", 0.0)
        if not self.training or rate == 0.0:
            return x, layout
        prefix, patches = x[:, : layout.num_prefix], x[:, layout.num_prefix :]
        kept = max(1, int(patches.shape[1] * (1 - rate)))
        index = torch.rand(patches.shape[:2], device=x.device).argsort(dim=1)[:, :kept].sort(dim=1).values
        patches = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        # dropping for regularisation is not merging: the kept tokens still stand for one patch each
        return torch.cat([prefix, patches], dim=1), layout.take(index).replace(sizes=None)


class _Taps:
    """Several taps as one; each sees what the one before it returned."""

    def __init__(self, taps: tuple[Any, ...]) -> None:
        self._taps = taps

    def wants(self, site: str, depth: int | None) -> bool:
        return any(tap.wants(site, depth) for tap in self._taps)

    def __call__(self, site: str, value: Tensor, depth: int | None, layout: TokenLayout) -> Tensor:
        for tap in self._taps:
            if tap.wants(site, depth):
                value = tap(site, value, depth, layout)
        return value


def _followed(layout: TokenLayout) -> TokenLayout:
    """Rotary tables for the rows as they are now: between blocks, so that no block recomputes them for the next."""
    return layout if layout.rotation is None else layout.rotation.follow(layout)


def _run_block(block: nn.Module, x: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
    return block(x, layout) if getattr(block, "takes_layout", False) else (block(x), layout)


def _as_bias(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
    return mask.to(q.dtype)


def _causal_bias(q: Tensor) -> Tensor:
    n = q.shape[-2]
    return torch.full((n, n), -math.inf, dtype=q.dtype, device=q.device).triu(1)


@contextmanager
def collect_aux(model: nn.Module) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Collect the auxiliary losses that parts write during the forwards inside the ``with``.

    Works on any model; one without a host or a backbone of ours collects nothing.
    """
    hosts = [m for m in model.modules() if hasattr(m, "aux_sink")]
    sink: dict[tuple[str, int], Tensor] = {}
    before = [h.aux_sink for h in hosts]
    for h in hosts:
        h.aux_sink = sink  # type: ignore[assignment]
    try:
        yield sink
    finally:
        for h, old in zip(hosts, before):
            h.aux_sink = old  # type: ignore[assignment]
