"""Attention over hyperedges that are built around the patches the class token looks for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput, unknown
from vitkit.models.cross_attention import CrossAttention
from vitkit.models.graph import gather_rows, incidence, kmeans, normalised_incidence, scattered, unit
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

# B batch · H heads · P prefix tokens · N patches · D width · M hyperedges · k members of one

TOPOLOGIES = ("bias", "mask", "none")
CHOICES = ("cls", "random", "norm", "kmeans")
#: hyperedges where their number is a share of the patches; a softmax over one would learn nothing
FEWEST, MOST = 4, 64


class Hypergraph(NamedTuple):
    """Hyperedges among the patches.

    Attributes:
        centers: patch in the middle of each hyperedge (B, M).
        members: patches of each hyperedge (B, M, k), the centre first.
        incidence: H (B, N, M) with k ones in every column.
    """

    centers: Tensor
    members: Tensor
    incidence: Tensor


class HypergraphAttention(nn.Module):
    """HyperGraph Attention: tokens → hyperedges → tokens, guided by who belongs together; cost N·M, not N².

    1. Centre sampling and kNN (CS-KNN), without gradient: the M patches with the largest ``x_cls·x_i/√D`` are centres
       (without class token ``x_cls`` is the mean of the patches); hyperedge j is the k patches most similar to its
       centre by dot product, the centre always among them.
    2. ``e_j = mean of its members``; ``Ĥ = D_v^{−1/2} H D_e^{−1/2}``.
    3. ``e ← e + attn(e → x; b_h Ĥᵀ)``: softmax over all tokens, with a learned b_h per head, 1 at the start.
    4. ``update = attn(x → LN e; b'_h Ĥ)``: softmax over the hyperedges.

    Prefix tokens are no centres and no members, but send in step 3 and receive in step 4 like patches.

    Args:
        centers: M, or a share of the patches if below 1, which then gives 4 to 64. Default 16.
        k: members of a hyperedge. Default 8; None: 2N/M.
        topology: "bias" as above; "mask": patches and hyperedges see each other only where H is 1, and a patch in no
            hyperedge gets the update 0; "none": H is used in step 2 only.
        choose: centres by "cls" as above, "norm" (largest), "random", or "kmeans" (nearest to the M means). Evaluation
            takes the same random patches in every call.

    Shape: (B, P+N, D) → (B, P+N, D). Works on any set of patches; those with ``valid=False`` are not seen, and merged
        ones count for all the patches they stand for.
    Raises: BadInput for counts below 1, an unknown ``topology`` or ``choose``.
    Paper: HGFormer: Topology-Aware Vision Transformer with HyperGraph Learning, arXiv:2504.02440.
    Departs from the paper: known by its abstract and a public review. The bias, the normalised incidence and the norm
        in front of step 4 are ours.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        centers: float = 16,
        k: int | None = 8,
        topology: str = "bias",
        choose: str = "cls",
    ) -> None:
        super().__init__()
        if centers <= 0 or (k is not None and k < 1) or (centers > 1 and centers != int(centers)):
            raise BadInput(
                f"centers={centers}, k={k}: a hypergraph needs a whole number of centres, or a share of the patches "
                "below 1, and at least one member each; the defaults are 16 and 8."
            )
        if topology not in TOPOLOGIES:
            raise unknown("topology", topology, TOPOLOGIES, "vitkit show hypergraph")
        if choose not in CHOICES:
            raise unknown("choice of centres", choose, CHOICES, "vitkit show hypergraph")
        self.centers, self.k, self.topology, self.choose = centers, k, topology, choose
        self.to_edges, self.to_nodes = CrossAttention(dim, num_heads), CrossAttention(dim, num_heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.edge_bias: nn.Parameter | None = None
        self.node_bias: nn.Parameter | None = None
        if topology == "bias":
            self.edge_bias, self.node_bias = nn.Parameter(torch.ones(num_heads)), nn.Parameter(torch.ones(num_heads))

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        centers: float = 16,
        k: int | None = 8,
        topology: str = "bias",
        choose: str = "cls",
    ) -> HypergraphAttention:
        new = cls(spec.dim, spec.num_heads, centers, k, topology, choose)
        if warm:
            new.to_edges = CrossAttention.like(old, spec.dim, spec.num_heads)
            new.to_nodes = CrossAttention.like(old, spec.dim, spec.num_heads)
        return new

    def counts(self, num_patches: int) -> tuple[int, int]:
        """M and k for N patches."""
        num = int(self.centers) if self.centers >= 1 else min(max(int(self.centers * num_patches), FEWEST), MOST)
        num = min(num, num_patches)
        return num, max(1, min(num_patches, 2 * num_patches // num if self.k is None else self.k))

    @torch.no_grad()
    def hypergraph(self, x: Tensor, layout: TokenLayout) -> Hypergraph:
        """The hyperedges among the patches of x (B, P+N, D)."""
        patches, valid = x[:, layout.num_prefix :], layout.valid
        num, k = self.counts(patches.shape[1])
        centers = self._centers(x, layout, num)
        similarity = gather_rows(patches, centers) @ patches.transpose(1, 2)
        if valid is not None:
            similarity = similarity.masked_fill(~valid.unsqueeze(1), -torch.inf)
        # a dot product does not rank a token first for itself
        similarity = similarity.scatter(2, centers.unsqueeze(2), torch.inf)
        members = similarity.topk(k, dim=-1).indices
        return Hypergraph(centers, members, incidence(members, patches.shape[1], valid))

    def _centers(self, x: Tensor, layout: TokenLayout, num: int) -> Tensor:
        patches, valid, num_patches = x[:, layout.num_prefix :], layout.valid, x.shape[1] - layout.num_prefix
        if self.choose == "random":
            return scattered(num, num_patches, x.device, shuffle=self.training, valid=valid)[:, 0].expand(
                x.shape[0], -1
            )
        if self.choose == "kmeans":
            labels, means = kmeans(patches, num, shuffle=self.training, valid=valid)
            near = means @ unit(patches).transpose(1, 2)
            own = labels.unsqueeze(1) == torch.arange(num, device=x.device).unsqueeze(1)
            # a mean without members takes the patch that is nearest all the same
            score = near.masked_fill(~(own | ~own.any(2, keepdim=True)), -torch.inf)
            if valid is not None:
                score = score.masked_fill(~valid.unsqueeze(1), -torch.inf)
            return score.argmax(2)
        score = patches.square().sum(-1) if self.choose == "norm" else self._by_class_token(x, layout)
        if valid is not None:
            score = score.masked_fill(~valid, -torch.inf)
        return score.topk(num, dim=1).indices

    @staticmethod
    def _by_class_token(x: Tensor, layout: TokenLayout) -> Tensor:
        patches = x[:, layout.num_prefix :]
        if "class" in dict(layout.prefix):
            looking = x[:, layout.prefix_slice("class")][:, :1]
        else:
            looking = (patches if layout.valid is None else patches * layout.valid.unsqueeze(2)).sum(1, keepdim=True)
        return (patches @ looking.transpose(1, 2)).squeeze(2)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        edges, up, down = self._guided(x, layout)
        edges = edges + self.to_edges(edges, x, *up)
        return self.to_nodes(x, self.norm(edges), *down)

    def weights(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Weights of the two attentions: (B, H, M, P+N) over tokens, (B, H, P+N, M) over hyperedges."""
        edges, up, down = self._guided(x, layout)
        update, to_edges = self.to_edges(edges, x, *up, need_weights=True)
        _, to_nodes = self.to_nodes(x, self.norm(edges + update), *down, need_weights=True)
        return to_edges, to_nodes

    def _guided(
        self, x: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]:
        """First states of the hyperedges (B, M, D); (bias, mask) towards them and back."""
        num_prefix = layout.num_prefix
        h = self.hypergraph(x, layout).incidence.to(x.dtype)
        share = h.transpose(1, 2) / h.sum(1).clamp(min=1).unsqueeze(2)
        edges = share @ x[:, num_prefix:]
        up_bias, down_bias = self._biases(h, num_prefix)
        mask = layout.key_mask()
        up_mask = None if mask is None else mask[:, None, None]
        down_mask = None
        if self.topology == "mask":
            open_to = nn.functional.pad(h.bool(), (0, 0, num_prefix, 0), value=True)
            up_mask, down_mask = open_to.transpose(1, 2).unsqueeze(1), open_to.unsqueeze(1)
        if layout.sizes is not None:
            # a merged token counts for all the patches it stands for
            log_size = nn.functional.pad(layout.sizes.clamp(min=1e-6).log().to(x.dtype), (num_prefix, 0))
            up_bias = log_size[:, None, None] if up_bias is None else up_bias + log_size[:, None, None]
        return edges, (up_bias, up_mask), (down_bias, down_mask)

    def _biases(self, h: Tensor, num_prefix: int) -> tuple[Tensor | None, Tensor | None]:
        if self.edge_bias is None or self.node_bias is None:
            return None, None
        # prefix tokens are nodes without hyperedge
        guide = nn.functional.pad(normalised_incidence(h), (0, 0, num_prefix, 0)).unsqueeze(1)
        return self.edge_bias.reshape(-1, 1, 1) * guide.transpose(2, 3), self.node_bias.reshape(-1, 1, 1) * guide

    def extra_repr(self) -> str:
        return f"centers={self.centers}, k={self.k}, topology={self.topology!r}, choose={self.choose!r}"
