"""Classification from several scales that are made to use different cues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers import Mlp, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown
from vitkit.models.cross_attention import CrossAttention

# B batch · S stages · N_s tokens of stage s on a grid (h_s, w_s) · D width of the heads · K classes

SCORES = ("logit", "entropy")
Grid = tuple[int, int]


class Cues(NamedTuple):
    """What the stages saw in a batch.

    Attributes:
        logits: (B, K), the answer. stage_logits: (B, S, K), the answer of each stage alone.
        gate: (B, S), weight of every stage; rows sum to 1.
        maps: of every stage, (B, h_s, w_s) in [0, 1]: how much each place speaks for the class.
        kept: of every stage, (B, k_s) the tokens it read, in raster order.
    """

    logits: Tensor
    stage_logits: Tensor
    gate: Tensor
    maps: list[Tensor]
    kept: list[Tensor]


class MultiScaleCues(nn.Module):
    """MDCM's head on S sequences of tokens: activate different cues, keep the useful tokens, weigh the stages.

    Stages go from fine to coarse. With T_s = LN(W_s LN(F_s)) and one classifier c_s per stage for its tokens and its
    class token:

    1. Activation (training only): ``T_s ← T_s ⊙ (1 − β·resize(M_{s−1}·[M_{s−1} in its top 20 %]))``, the cue map
       M_s being the logit of the class per token, min–max scaled to [0, 1]; no gradient through this M, and its class
       is the stage's own answer: suppressing the cues of the label would tell the next stage the label.
       Loss: ``λ_d Σ_{s<t} cos(resize(M_s), M_t)``, which has a gradient.
    2. Selection: the ⌈ρ_s N_s⌉ tokens with the largest score stay; loss on the others: ``λ_b KL(uniform ‖
       softmax(c_s(t)))``, mean over tokens. A learned class token and the kept ones go through a transformer layer,
       which gives z_s and the stage's logits ``c_s(z_s)``.
    3. Aggregation: ``w = softmax(MLP([z_1 … z_S]))``, ``logits = Σ_s w_s c_s(z_s)``.
    4. Where the labels are known: ``λ_s Σ_s CE(c_s(z_s), y)``, with label smoothing, beside the loss of the answer.

    The class of any other map is the label where it is known (see :func:`vitkit.models.labels.known_labels`, which the
    training loop uses for single-label classification), else the stage's own answer. Labels choose losses only: z and
    the logits do not depend on them. As only the class token of the layer is read, it is computed as a
    cross-attention.

    Args:
        dims: width of the tokens of every stage.
        num_classes: K ≥ 1.
        dim: D.
        num_heads: of the layer; None: 8, or the largest power of two below that divides D.
        mlp_ratio: hidden width of its MLP over D.
        keep: ρ of every stage; None: evenly spaced from 0.25 to 0.75, and 0.75 for a single stage.
        suppress: β in [0, 1].
        top: share of a stage's places whose cues are suppressed in the next.
        score: of a token, "logit" (its largest logit) or "entropy" (how sure its probabilities are).
        gate: False weighs all stages alike.
        diversity, background, stage_loss: λ_d, λ_b, λ_s.
        smoothing: of the labels in the stages' losses.

    Shape: S tensors (B, N_s, D_s) and S grids → logits (B, K).
    Raises: BadInput for an argument outside its range; UnknownName for another ``score``.
    Paper: Multi-scale Activation, Refinement, and Aggregation: Exploring Diverse Cues for Fine-Grained Bird
        Recognition, arXiv:2504.09215.
    Departs from the paper: known by its abstract. The suppression rule, the score, all losses and their weights, and
        the ratios are ours.
    """

    wants_labels = True
    labels: Tensor | None = None

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int,
        dim: int = 512,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        keep: Sequence[float] | float | None = None,
        suppress: float = 0.5,
        top: float = 0.2,
        score: str = "logit",
        gate: bool = True,
        diversity: float = 0.1,
        background: float = 0.1,
        stage_loss: float = 1.0,
        smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise BadInput(f"MDCM selects tokens by its classifiers, so num_classes={num_classes} must be at least 1.")
        if score not in SCORES:
            raise unknown("score", score, SCORES, "vitkit show mdcm")
        self.keep = _ratios(keep, len(dims))
        for name, value in (("suppress", suppress), ("top", top)):
            if not 0 <= value <= 1:
                raise BadInput(f"{name}={value} must lie in [0, 1].")
        self.suppress, self.top, self.score = suppress, top, score
        self.diversity, self.background, self.stage_loss = diversity, background, stage_loss
        self.smoothing, self.dim, self.num_classes = smoothing, dim, num_classes
        heads = num_heads or next(h for h in (8, 4, 2, 1) if dim % h == 0)
        self.stages = nn.ModuleList(StageHead(width, dim, heads, mlp_ratio) for width in dims)
        self.classifiers = nn.ModuleList(_linear(dim, num_classes) for _ in dims)
        self.gate: nn.Module | None = None
        if gate and len(dims) > 1:
            # a last bias that all weights share would add the same everywhere, but one per stage is a preference
            self.gate = nn.Sequential(_linear(len(dims) * dim, dim), nn.GELU(), _linear(dim, len(dims)))

    def reset(self, num_classes: int) -> None:
        """Fresh classifiers."""
        if num_classes < 1:
            raise BadInput(f"MDCM selects tokens by its classifiers, so num_classes={num_classes} must be at least 1.")
        like = self.classifiers[0].weight
        self.num_classes = num_classes
        for i in range(len(self.classifiers)):
            self.classifiers[i] = _linear(self.dim, num_classes).to(like.device, like.dtype)  # type: ignore[arg-type]

    def forward(self, tokens: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
        return self.answer(self.read(tokens, grids, {}))

    def read(
        self,
        tokens: Sequence[Tensor],
        grids: Sequence[Grid],
        aux: dict[tuple[str, int], Tensor],
        target: Tensor | None = None,
    ) -> Tensor:
        """Vectors z (B, S, D) of all stages; in training the losses go to ``aux``.

        Args:
            tokens: (B, N_s, D_s) of every stage, fine to coarse, without prefix. grids: (h_s, w_s), N_s = h_s·w_s.
            aux: gets ``"mdcm_diversity"``, ``"mdcm_background"`` and, with labels, ``"mdcm_stages"``.
            target: labels (B,); None: those of :func:`known_labels`, if any.
        """
        return self._walk(tokens, grids, aux, target, want_maps=False)[0]

    def answer(self, z: Tensor) -> Tensor:
        """Vectors (B, S, D) → logits (B, K)."""
        return (self.weights(z).unsqueeze(1) @ self.stage_logits(z)).squeeze(1)

    def weights(self, z: Tensor) -> Tensor:
        """(B, S), rows sum to 1."""
        if self.gate is None:
            return z.new_full(z.shape[:2], 1 / z.shape[1])
        return self.gate(z.flatten(1)).softmax(-1)

    def stage_logits(self, z: Tensor) -> Tensor:
        """(B, S, K)."""
        return torch.stack([fc(z[:, s]) for s, fc in enumerate(self.classifiers)], 1)

    def cues(self, tokens: Sequence[Tensor], grids: Sequence[Grid], target: Tensor | None = None) -> Cues:
        """All that is to be seen of a batch; ``target`` (B,) chooses the class of the maps."""
        z, maps, kept = self._walk(tokens, grids, {}, target, want_maps=True)
        return Cues(self.answer(z), self.stage_logits(z), self.weights(z), maps, kept)

    # -- inside --------------------------------------------------------------------------------------------------

    def _walk(
        self,
        tokens: Sequence[Tensor],
        grids: Sequence[Grid],
        aux: dict[tuple[str, int], Tensor],
        target: Tensor | None,
        want_maps: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        if len(tokens) != len(self.stages) or len(grids) != len(tokens):
            raise BadInput(
                f"This head reads {len(self.stages)} stages and got {len(tokens)}; give one tensor for each."
            )
        labels = target if target is not None else self.labels
        vectors: list[Tensor] = []
        answers: list[Tensor] = []
        maps: list[Tensor] = []
        kept: list[Tensor] = []
        rejected: list[Tensor] = []
        used: Tensor | None = None
        for s, (stage, classify) in enumerate(zip(self.stages, self.classifiers)):
            t = stage.tokens(tokens[s])  # type: ignore[operator]
            if used is not None:
                strength = self.suppress * resize(_strongest(used, self.top), grids[s]).flatten(1)
                t = t * (1 - strength).unsqueeze(-1).to(t.dtype)
            logits = classify(t)
            order = self._scores(logits).argsort(dim=1, descending=True, stable=True)
            count = num_kept(self.keep[s], t.shape[1])
            chosen = order[:, :count].sort(1).values
            z = stage.read(t.gather(1, chosen.unsqueeze(-1).expand(-1, -1, t.shape[-1])))  # type: ignore[operator]
            answer = classify(z)
            own = answer.detach().argmax(-1)
            vectors.append(z)
            answers.append(answer)
            kept.append(chosen)
            if self.training and self.background and count < t.shape[1]:
                rest = order[:, count:].unsqueeze(-1).expand(-1, -1, logits.shape[-1])
                rejected.append(_from_uniform(logits.gather(1, rest)))
            if want_maps or (self.training and self.diversity and len(self.stages) > 1):
                maps.append(_cue_map(logits, _classes(labels, own)).reshape(-1, *grids[s]))
            if self.training and self.suppress and s + 1 < len(self.stages):
                # never the label's map: where tokens are suppressed would give the label away, in training only
                used = _cue_map(logits.detach(), own).reshape(-1, *grids[s])
        if self.training:
            self._regularise(maps, rejected, answers, labels, aux)
        return torch.stack(vectors, 1), maps, kept

    def _scores(self, logits: Tensor) -> Tensor:
        logits = logits.detach().float()
        if self.score == "logit":
            return logits.amax(-1)
        log_p = logits.log_softmax(-1)
        return (log_p.exp() * log_p).sum(-1)

    def _regularise(
        self,
        maps: list[Tensor],
        rejected: list[Tensor],
        answers: list[Tensor],
        labels: Tensor | None,
        aux: dict[tuple[str, int], Tensor],
    ) -> None:
        if self.diversity and len(maps) > 1:
            pairs = [(s, t) for t in range(len(maps)) for s in range(t)]
            alike = [_cosine(resize(maps[s], (maps[t].shape[1], maps[t].shape[2])), maps[t]) for s, t in pairs]
            aux["mdcm_diversity", 0] = self.diversity * torch.stack(alike).sum()
        if rejected:
            aux["mdcm_background", 0] = self.background * torch.stack(rejected).sum()
        if self.stage_loss and labels is not None:
            each = [F.cross_entropy(a.float(), labels, label_smoothing=self.smoothing) for a in answers]
            aux["mdcm_stages", 0] = self.stage_loss * torch.stack(each).sum()

    def extra_repr(self) -> str:
        return f"keep={self.keep}, suppress={self.suppress}, top={self.top}, score={self.score!r}"


class StageHead(nn.Module):
    """One stage of :class:`MultiScaleCues`: tokens (B, N, width) → T (B, N, D), and some of them → z (B, D).

    ``u = c + CA(q = LN₁(c), kv = [LN₁(c); T])``, ``z = LN₃(u + MLP(LN₂(u)))`` with a learned class token c.
    """

    def __init__(self, width: int, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width, eps=1e-6)
        self.proj = _linear(width, dim)
        # behind the projection: a norm further on would undo the suppression, which is a factor
        self.norm_tokens = nn.LayerNorm(dim, eps=1e-6)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn = CrossAttention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def tokens(self, x: Tensor) -> Tensor:
        return self.norm_tokens(self.proj(self.norm_in(x)))

    def read(self, tokens: Tensor) -> Tensor:
        state = self.cls_token.expand(tokens.shape[0], -1, -1)
        query = self.norm1(state)
        state = state + self.attn(query, torch.cat([query.to(tokens.dtype), tokens], 1))
        return self.norm3(state + self.mlp(self.norm2(state)))[:, 0]


def num_kept(ratio: float, num_tokens: int) -> int:
    """⌈ρN⌉, at least 1; what rounding adds to ρN does not count."""
    return min(num_tokens, max(1, math.ceil(ratio * num_tokens - 1e-9)))


def resize(maps: Tensor, grid: Grid) -> Tensor:
    """Maps (B, h, w) on another grid: means over the cells they shrink to, bilinear where they grow."""
    if tuple(maps.shape[1:]) == tuple(grid):
        return maps
    if maps.shape[1] >= grid[0] and maps.shape[2] >= grid[1]:
        return F.adaptive_avg_pool2d(maps.unsqueeze(1), grid).squeeze(1)
    return F.interpolate(maps.unsqueeze(1), size=grid, mode="bilinear", align_corners=False).squeeze(1)


def _ratios(keep: Sequence[float] | float | None, num: int) -> tuple[float, ...]:
    if keep is None:
        found = [0.25 + 0.5 * i / (num - 1) for i in range(num)] if num > 1 else [0.75]
    else:
        found = [float(keep)] * num if isinstance(keep, (int, float)) else [float(k) for k in keep]
    if len(found) != num or not num or not all(0 < k <= 1 for k in found):
        raise BadInput(f"keep={keep} must be shares in (0, 1], one for each of the {num} stages.")
    return tuple(found)


def _linear(width: int, out: int) -> nn.Linear:
    linear = nn.Linear(width, out)
    trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def _classes(labels: Tensor | None, own: Tensor) -> Tensor:
    if labels is None:
        return own
    return labels if labels.ndim == 1 else labels.argmax(-1)


def _cue_map(logits: Tensor, classes: Tensor) -> Tensor:
    """(B, N) in [0, 1]; a map without contrast is 0."""
    index = classes.reshape(-1, 1, 1).expand(-1, logits.shape[1], 1)
    cue = logits.float().gather(2, index).squeeze(-1)
    low = cue.amin(1, keepdim=True)
    return (cue - low) / (cue.amax(1, keepdim=True) - low).clamp(min=1e-6)


def _strongest(maps: Tensor, share: float) -> Tensor:
    """Maps (B, h, w) with all but their ⌈share·N⌉ largest values set to 0."""
    flat = maps.flatten(1)
    index = flat.argsort(dim=1, descending=True, stable=True)[:, : math.ceil(share * flat.shape[1] - 1e-9)]
    return torch.zeros_like(flat).scatter(1, index, flat.gather(1, index)).reshape(maps.shape)


def _from_uniform(logits: Tensor) -> Tensor:
    """``KL(uniform ‖ softmax)``, mean over tokens."""
    log_p = logits.float().log_softmax(-1)
    return -log_p.mean() - math.log(logits.shape[-1])


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1, eps=1e-6).mean()
