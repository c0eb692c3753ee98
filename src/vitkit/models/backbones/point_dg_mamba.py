"""PointDGMamba: a state-space network for clouds of points that leaves noisy tokens out of its scans."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import Backbone, cfg, create
from vitkit.models.graph import gather_rows
from vitkit.models.point_order import check_order, point_order
from vitkit.models.points import PointTokenizer, nearest_points, points_from_images
from vitkit.models.scan_order import join_pair, split_pair
from vitkit.models.ssm import CausalConv, SelectiveSSM, own_names, rank_of_step

__all__ = ["Denoise", "PointDGMamba", "SequenceMamba"]

# B batch · n points · G tokens · D channels · K orders · R sequences of a cloud, L long · S sequences in all

COMBINE = ("concat", "average")


class PointTokens(NamedTuple):
    """The tokens of clouds, in canonical order: along the first of the network's orders.

    Attributes:
        x: (B, G, D), the positions added.
        centres: (B, G, 3).
        keep: (B, G), 1 for a token and 0 for a masked one, with the gradient of the score; None without masking.
        aux: auxiliary losses, written as ``aux[name, depth]``.
    """

    x: Tensor
    centres: Tensor
    keep: Tensor | None
    aux: dict[tuple[str, int], Tensor]


class PointState(NamedTuple):
    """The sequences of clouds on their way through the blocks.

    Attributes:
        x: (B, R, L, D).
        still: (B, R, L) bool, True at masked tokens; None without any.
        places: (B, K, G), where token g stands in order k.
        keep, aux: as in :class:`PointTokens`.
    """

    x: Tensor
    still: Tensor | None
    places: Tensor
    keep: Tensor | None
    aux: dict[tuple[str, int], Tensor]

    def take(self, index: Tensor) -> PointState:
        """The clouds ``index`` (P,) of the batch."""
        still = None if self.still is None else self.still[index]
        keep = None if self.keep is None else self.keep[index]
        return self._replace(x=self.x[index], still=still, places=self.places[index], keep=keep)


class Denoise(nn.Module):
    """Masked sequence denoising: scores every token and masks the noisy ones, at most a share of them.

    ``m_i = σ(MLP([x_i; ρ_i; s_i]))`` with the relative density ρ and the mean cosine similarity s to the tokens of the
    nearest centres. Masked are tokens with m < ½; if they are too many, those with the lowest scores.

    Args:
        dim: D. max_masked: share of the tokens of a cloud that may be masked, in [0, 1).
        neighbours: nearest tokens that x_i is compared with. start: m of all tokens before training, about.

    Shape: x (B, G, D), centres (B, G, 3), density (B, G) → masked (B, G) bool, m (B, G) in float32.
    """

    def __init__(self, dim: int, max_masked: float = 0.2, neighbours: int = 8, start: float = 0.9) -> None:
        super().__init__()
        self.max_masked, self.neighbours = max_masked, neighbours
        last = nn.Linear(max(8, dim // 4), 1)
        # nothing is masked before anything is learned
        nn.init.constant_(last.bias, math.log(start / (1 - start)))
        self.score = nn.Sequential(nn.Linear(dim + 2, last.in_features), nn.GELU(), last)

    def forward(self, x: Tensor, centres: Tensor, density: Tensor) -> tuple[Tensor, Tensor]:
        num_tokens = x.shape[1]
        index = nearest_points(centres, centres, min(self.neighbours + 1, num_tokens))[..., 1:]
        direction = F.normalize(x.float(), dim=-1)
        # a cloud of one token has no neighbours, and nothing to be unlike
        alike = (gather_rows(direction, index) @ direction.unsqueeze(3)).squeeze(3).sum(2) / max(1, index.shape[2])
        seen = torch.cat([x, density.to(x.dtype).unsqueeze(2), alike.to(x.dtype).unsqueeze(2)], 2)
        m = self.score(seen).squeeze(2).float().sigmoid()
        with torch.no_grad():
            rank = m.argsort(dim=1, stable=True).argsort(dim=1)
            masked = (m < 0.5) & (rank < int(self.max_masked * num_tokens))
        return masked, m

    def extra_repr(self) -> str:
        return f"max_masked={self.max_masked}, neighbours={self.neighbours}"


class SequenceMamba(nn.Module):
    """Mamba's layer on sequences in both directions, in which masked steps do not exist for the others.

    ``(u, z) = W_in x``; ``update = W_out ((SSM₁(SiLU(conv₁ u)) + flip SSM₂(SiLU(conv₂ flip u))) ⊙ SiLU(z))``. At a
    ``still`` step the convolution gets and gives zeros, its bias too, and the state passes unchanged: a_t = 1, b_t = 0.

    Args:
        dim: D. expand: E/D. d_state, d_conv: states per channel, taps.

    Shape: x (S, L, D), still (S, L) bool or None → (S, L, D).
    Raises: BadInput for sizes below 1.
    """

    def __init__(self, dim: int, expand: float = 2, d_state: int = 16, d_conv: int = 4) -> None:
        super().__init__()
        inner = round(expand * dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = CausalConv(2 * inner, d_conv)
        self.ssm = SelectiveSSM(inner, 2, d_state, rank_of_step(dim, None))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, still: Tensor | None = None) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        lines, gone = torch.stack([u, u.flip(1)], 2), None
        if still is not None:
            gone = torch.stack([still, still.flip(1)], 2)
            lines = lines.masked_fill(gone.unsqueeze(-1), 0)
        lines = self.conv(lines.flatten(2)).view(lines.shape)
        if gone is not None:
            lines = lines.masked_fill(gone.unsqueeze(-1), 0)
        there, back = self.ssm(F.silu(lines), gone).unbind(2)
        return self.out_proj((there + back.flip(1)) * F.silu(z))


class PointBlock(nn.Module):
    """``x ← x + SequenceMamba(LN(x))`` on all sequences of a state."""

    def __init__(self, dim: int, expand: float, d_state: int, d_conv: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.mixer = SequenceMamba(dim, expand, d_state, d_conv)
        self.drop_path = DropPath(drop_path)

    def forward(self, state: PointState) -> PointState:
        x = state.x.flatten(0, 1)
        still = None if state.still is None else state.still.flatten(0, 1)
        x = x + self.drop_path(self.mixer(self.norm(x), still))
        return state._replace(x=x.view(state.x.shape))


class PointDGMamba(Backbone):
    """Point groups in several orders of space, denoised, then bidirectional Mamba blocks and a mean over the tokens.

    Tokens are those of :class:`~vitkit.models.points.PointTokenizer` plus an MLP of their centres. :class:`Denoise`
    masks up to a fifth of them: in the blocks they change no other token, and the mean leaves them out. The decision
    is hard; its gradient is that of m (straight-through), by the strength of the tokens kept and by what every token
    adds to the mean. The loss ``mask_weight · (mean m − keep_ratio)²`` goes to ``aux["mask", 0]``. The tokens then
    stand in K orders through space, each with a learned scale and shift of its channels.

    Trained on images or clouds like any network, it is the paper's without its two means for training on several
    domains (feature aggregation and dual-level scanning); those are :class:`~vitkit.pretrain.point_dg.PointDG`, which
    trains this network and leaves it as it is: evaluation knows no labels, domains or prototypes.

    The order in which the points of a cloud come does not matter, to the bit. Images are taken too, as the points
    (x, y, brightness) of their most salient pixels, see :func:`~vitkit.models.points.points_from_images`.

    Args:
        img_size: (H, W) or a side; only ``num_points=None`` needs it, every other size works too.
        in_chans: channels of images; their mean is the brightness.
        num_classes, global_pool ("avg", ""), drop_rate: as in timm.
        embed_dim, depth: D and the number of blocks.
        groups: G. neighbours: k points of a group. point_width: of the mini-PointNet.
        num_points: taken from an image; None: half of its pixels, at least 64 and at most 1,024.
        orders: K names for :func:`~vitkit.models.point_order.point_order`; the first is the canonical one.
        combine: "concat" (one sequence of K·G tokens) or "average" (K sequences, a token is their mean at the end).
        bits: of a coordinate in the orders; 5 cuts space into 32 cells a side.
        max_masked: share of tokens that may be masked; 0 is the network without masking (PointMamba, in both
            directions).
        keep_ratio, mask_weight: of the loss on the mean score.
        expand, d_state, d_conv: of the Mamba blocks.
        drop_path_rate: stochastic depth of the last block, growing linearly.

    Shape: clouds (B, n, 3), best centred in the unit sphere, or images (B, C, H, W) → (B, num_classes). A cloud of
        fewer than G points has one token a point.
    Raises: BadInput for other shapes or channels, or settings out of range. UnknownName for another order.
    Paper: PointDGMamba: Domain Generalization of Point Cloud Classification via Generalized State Space Model,
        arXiv:2408.13574.
    Departs from the paper: known by its abstract. The predictor of the mask, its limits and its loss, the tokens
        (PointMamba's), the orders and the sizes are ours, and so is taking images. The scores look at all tokens, so a
        masked one may change which others are masked, but nothing else. Masked tokens leave a gap that the convolution
        sees as zeros; the sequence does not close up.
    """

    onnx_note = "the exporter has no torch.cdist, and cannot read the bits of distances by which near points are sorted"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 384,
        depth: int = 12,
        groups: int = 64,
        neighbours: int = 32,
        point_width: int = 128,
        num_points: int | None = None,
        orders: tuple[str, ...] = ("hilbert", "xyz", "zyx"),
        combine: str = "concat",
        bits: int = 5,
        max_masked: float = 0.2,
        keep_ratio: float = 0.9,
        mask_weight: float = 0.1,
        expand: float = 2,
        d_state: int = 16,
        d_conv: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not orders:
            raise BadInput('PointDGMamba needs at least one order, such as orders=("hilbert",).')
        for kind in orders:
            check_order(kind, bits)
        if combine not in COMBINE:
            raise BadInput(f"combine={combine!r} is not known; it is one of {', '.join(COMBINE)}.")
        if not 0 <= max_masked < 1 or not 0 < keep_ratio <= 1:
            raise BadInput(
                f"max_masked={max_masked} must lie in [0, 1) and keep_ratio={keep_ratio} in (0, 1]; 0.2 and 0.9 are "
                "the defaults."
            )
        height, width = to_2tuple(img_size)
        self.num_points = min(max(height * width // 2, 64), 1024) if num_points is None else num_points
        self.orders, self.combine, self.bits = tuple(orders), combine, bits
        self.groups, self.keep_ratio, self.mask_weight = groups, keep_ratio, mask_weight
        self.stem = PointTokenizer(embed_dim, groups, neighbours, point_width)
        self.denoise = Denoise(embed_dim, max_masked) if max_masked else None
        self.order_scale = nn.Parameter(torch.ones(len(orders), embed_dim))
        self.order_shift = nn.Parameter(torch.zeros(len(orders), embed_dim))
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.stages = nn.ModuleList(PointBlock(embed_dim, expand, d_state, d_conv, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.finish_init([embed_dim] * depth, [1] * depth, num_classes, in_chans, global_pool, drop_rate)
        with torch.no_grad():
            for block in self.stages:
                # the sum of all updates starts as large as one
                block.mixer.out_proj.weight.div_(depth**0.5)

    # -- from clouds to logits, step by step ----------------------------------------------------------------------

    def tokenise(self, inputs: Tensor) -> PointTokens:
        """Clouds (B, n, 3) or images (B, C, H, W) → their tokens, scored and in canonical order."""
        found = self.stem(self.as_points(inputs))
        rows = point_order(found.centres, self.orders[0], self.bits)
        x, position, centres = (gather_rows(t, rows) for t in found[:3])
        aux = self.aux_sink if self.aux_sink is not None else {}
        keep = None
        if self.denoise is not None:
            masked, m = self.denoise(x, centres, found.density.gather(1, rows))
            aux["mask", 0] = self.mask_weight * (m.mean() - self.keep_ratio).square()
            # zero, with the gradient of m
            through = (m - m.detach()).to(x.dtype)
            keep = (~masked).to(x.dtype) + through
            x = x * (1 + through).unsqueeze(2)
        return PointTokens(x + position, centres, keep, aux)

    def serialise(self, tokens: PointTokens) -> PointState:
        """Tokens → the sequences that the blocks scan."""
        rows = torch.stack([point_order(tokens.centres, kind, self.bits) for kind in self.orders], 1)
        x = gather_rows(tokens.x, rows) * self.order_scale.unsqueeze(1) + self.order_shift.unsqueeze(1)
        still = None
        if tokens.keep is not None:
            still = gather_rows((tokens.keep < 0.5).unsqueeze(2), rows).squeeze(3)
        if self.combine == "concat":
            x, still = x.flatten(1, 2).unsqueeze(1), None if still is None else still.flatten(1, 2).unsqueeze(1)
        return PointState(x, still, rows.argsort(dim=2), tokens.keep, tokens.aux)

    def scan(self, state: PointState) -> PointState:
        """All blocks."""
        for stage in self.stages:
            state = self.step(stage, state)
        return state

    def scan_pair(self, first: PointState, second: PointState, how: str) -> tuple[PointState, PointState]:
        """All blocks on the sequences of two clouds joined to one twice as long, and both clouds back.

        Args:
            first, second: P clouds each, made by :meth:`serialise`.
            how: "sequential" (one after the other) or "interleave" (token by token in turn).
        """
        state = self.scan(join_states(first, second, how))
        return split_states(state, first, second, how)

    def as_points(self, inputs: Tensor) -> Tensor:
        """Clouds as they are, images as clouds.

        Raises: BadInput for anything else.
        """
        if inputs.ndim == 3 and inputs.shape[2] == 3:
            return inputs
        if inputs.ndim != 4:
            raise BadInput(
                "PointDGMamba takes clouds (B, n, 3) or images (B, C, H, W); it got "
                f"{'×'.join(map(str, inputs.shape))}."
            )
        if inputs.shape[1] != self.in_chans:
            raise BadInput(
                f"The images have {inputs.shape[1]} channels, and the network was made for {self.in_chans}; create it "
                f"with in_chans={inputs.shape[1]}."
            )
        return points_from_images(inputs, self.num_points)

    # -- the contract of a backbone -------------------------------------------------------------------------------

    def begin(self, images: Tensor) -> PointState:
        return self.serialise(self.tokenise(images))

    def as_map(self, state: PointState) -> Tensor:
        """Tokens have no grid: (B, D, 1, G), a map of one row in canonical order."""
        return self._restore(state).transpose(1, 2).unsqueeze(2)

    def features(self, state: PointState) -> Tensor:
        """(B, G, D), normalised; masked tokens are 0 and the others scaled up so that the mean is that of the kept."""
        x = self.norm(self._restore(state))
        if state.keep is None:
            return x
        return x * (state.keep / state.keep.mean(1, keepdim=True)).unsqueeze(2)

    def _restore(self, state: PointState) -> Tensor:
        """Every token's mean over its places in the orders, (B, G, D)."""
        orders, num_tokens = state.places.shape[1:]
        first = num_tokens * torch.arange(orders, device=state.places.device).unsqueeze(1)
        # whether one sequence or K, order follows order in memory
        return gather_rows(state.x.flatten(1, 2), state.places + first).mean(1)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {**super().group_matcher(coarse), "stem": r"^stem|^denoise|^order_"}

    def no_weight_decay(self) -> set[str]:
        """Those of the state-space layers, and what tells the orders apart."""
        return super().no_weight_decay() | own_names(self) | {"order_scale", "order_shift"}


def join_states(first: PointState, second: PointState, how: str) -> PointState:
    """The sequences of two clouds each as one; :func:`split_states` is the inverse.

    Raises: UnknownName: another way than those of :func:`~vitkit.models.scan_order.join_pair`.
    """
    x = _join(first.x, second.x, how)
    still = None
    if first.still is not None and second.still is not None:
        still = _join(first.still.unsqueeze(3), second.still.unsqueeze(3), how).squeeze(3)
    return first._replace(x=x, still=still)


def split_states(joined: PointState, first: PointState, second: PointState, how: str) -> tuple[PointState, PointState]:
    """What :func:`join_states` made one of ``first`` and ``second``, with the values of now."""
    sequences = joined.x.shape[1]
    a, b = (half.unflatten(0, (-1, sequences)) for half in split_pair(joined.x.flatten(0, 1), how))
    return first._replace(x=a), second._replace(x=b)


def _join(first: Tensor, second: Tensor, how: str) -> Tensor:
    joined = join_pair(first.flatten(0, 1), second.flatten(0, 1), how)
    return joined.unflatten(0, first.shape[:2])


_SMALL = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
default_cfgs = generate_default_cfgs(
    {
        "point_dg_mamba_femto": cfg(**_SMALL, pool_size=None, first_conv=()),
        "point_dg_mamba": cfg(pool_size=None, first_conv=()),
    }
)


@register_model
def point_dg_mamba_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels and small clouds: 64 wide, 4 blocks, 32 groups of 16 points, 8 states."""
    sizes = {"img_size": 32, "embed_dim": 64, "depth": 4, "groups": 32, "neighbours": 16}
    return _create("point_dg_mamba_femto", pretrained, {**sizes, "point_width": 32, "d_state": 8}, kwargs)


@register_model
def point_dg_mamba(pretrained: bool = False, **kwargs: Any) -> Any:
    """For clouds of 1,024 points: 384 wide, 12 blocks, 64 groups of 32 points."""
    return _create("point_dg_mamba", pretrained, {}, kwargs)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    return create(PointDGMamba, variant, pretrained, defaults, kwargs, out_indices=(-1,))
