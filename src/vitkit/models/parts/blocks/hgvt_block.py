"""A block on patches, virtual vertices and hyperedges: vertices talk where they share a hyperedge."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from timm.layers import Mlp as TimmMlp
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.cross_attention import CrossAttention
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.hyper_pool import Adjacency, Membership, aggregate, distribute, log_sizes
from vitkit.models.spec import PartSpec

# B batch · P prefix tokens · N patches · D width · V vertices (patches, class token … and virtual ones) · m hyperedges

#: names of the prefix groups that hold virtual vertices, primary and virtual hyperedges, in this order
VIRTUAL, EDGE, VIRTUAL_EDGE = "virtual", "edge", "virtual_edge"
#: β, γ: share of its vertices that a hyperedge may hold without penalty
POPULATION = (0.05, 0.5)


class HgVTBlock(nn.Module):
    """Hypergraph block: membership, then attention vertex → vertex, vertex → hyperedge, hyperedge → vertex, then MLPs.

    Vertices V are all rows but the hyperedges: patches, class token and registers if any, and virtual vertices.
    Hyperedges E are primary (open to all vertices) or virtual (open to virtual vertices only). Each step is pre-norm
    with a residual:

    1. ``A = σ(4 cos(W_a V, W_e E))``, Â = [A > ½]; closed pairs are 0.
    2. ``V ← V + attn(V → V)`` where two vertices share a hyperedge, (ÂÂᵀ)_uv > 0, or u = v.
    3. ``E ← E + attn(E → V; log A)`` within Âᵀ; a hyperedge without members keeps its state.
    4. ``V ← V + attn(V → E; log A)`` within Â; a vertex in no hyperedge keeps its state.
    5. ``V ← V + MLP(V)``, ``E ← E + MLP(E)``, one MLP each.

    Virtual vertices and hyperedges are prefix groups "virtual", "edge" and "virtual_edge", which the first of these
    blocks puts at the end of the prefix. In training each block leaves two losses in ``layout.aux``: "diversity", mean
    squared cosine between different virtual vertices plus that between different hyperedges, and "population", mean
    of ``ReLU(β − s)² + ReLU(s − γ)²`` over hyperedges with mean membership s (β = 0.05, γ = 0.5), both weighted.

    Args:
        vertices: virtual vertices. Default 16. edges: primary hyperedges. Default 32.
        virtual_edges: hyperedges between virtual vertices. Default 8.
        features: width of the vectors compared for membership. Default 64.
        diversity, population: weights of the two losses; 0 leaves one out. Default 0.1.
        first: index of the first block that is one of these, which holds the learned initial states. Default 0; with
            ``where="last:2"`` of 12 blocks give 10.

    Shape: (B, P+N, D), layout → (B, P'+N, D), layout; P' = P + vertices + edges + virtual_edges behind the first.
    Raises: BadInput for impossible counts, or if the hyperedges are missing because ``first`` is another block.
    Paper: Hypergraph Vision Transformers: Images are More than Nodes, More than Edges, arXiv:2504.08710.
    Departs from the paper: known by a detailed summary. Counts, widths, β, γ, log-memberships in the logits, and class
        token and registers as vertices are ours.
    """

    slot = "block"
    preserves = "none"
    takes_layout = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        vertices: int = 16,
        edges: int = 32,
        virtual_edges: int = 8,
        features: int = 64,
        diversity: float = 0.1,
        population: float = 0.1,
        depth: int = 0,
        first: int = 0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if vertices < 0 or virtual_edges < 0 or edges < 1 or (virtual_edges and not vertices):
            raise BadInput(
                f"vertices={vertices}, edges={edges}, virtual_edges={virtual_edges}: there must be at least one edge, "
                "and virtual edges need virtual vertices; the defaults are 16, 32 and 8."
            )
        self.counts = {VIRTUAL: vertices, EDGE: edges, VIRTUAL_EDGE: virtual_edges}
        self.diversity, self.population = diversity, population
        self.depth_index, self.first = depth, first
        self.states: nn.Parameter | None = None
        if depth == first:
            # of the size of tokens behind a norm: much smaller ones would all become what they pool in the first block
            self.states = nn.Parameter(torch.randn(1, sum(self.counts.values()), dim))
        self.adjacency = Adjacency(dim, features)
        self.vertex_norms = nn.ModuleList([nn.LayerNorm(dim, eps=1e-6) for _ in range(3)])
        self.edge_norms = nn.ModuleList([nn.LayerNorm(dim, eps=1e-6) for _ in range(3)])
        self.between = CrossAttention(dim, num_heads)
        self.aggregate = CrossAttention(dim, num_heads)
        self.distribute = CrossAttention(dim, num_heads)
        self.vertex_mlp, self.edge_mlp = TimmMlp(dim, hidden), TimmMlp(dim, hidden)
        for mlp in (self.vertex_mlp, self.edge_mlp):
            for linear in (mlp.fc1, mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.constant_(linear.get_parameter("bias"), 0.0)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        vertices: int = 16,
        edges: int = 32,
        virtual_edges: int = 8,
        features: int = 64,
        diversity: float = 0.1,
        population: float = 0.1,
        first: int = 0,
    ) -> HgVTBlock:
        hidden, depth = round(spec.dim * spec.mlp_ratio), spec.depth or 0
        drop_path = float(getattr(getattr(old, "drop_path1", None), "drop_prob", None) or 0.0)
        new = cls(
            spec.dim, spec.num_heads, hidden, vertices, edges, virtual_edges, features, diversity, population, depth,
            first, drop_path,
        )  # fmt: skip
        if warm:
            attn, mlp = getattr(old, "attn", None), getattr(old, "mlp", None)
            for name in ("between", "aggregate", "distribute"):
                setattr(new, name, CrossAttention.like(attn, spec.dim, spec.num_heads))
            for ours in (new.vertex_mlp, new.edge_mlp):
                for name in ("fc1", "fc2"):
                    theirs, mine = getattr(mlp, name, None), getattr(ours, name)
                    if isinstance(theirs, nn.Linear) and theirs.weight.shape == mine.weight.shape:
                        mine.load_state_dict(theirs.state_dict(), strict=False)
        return new

    def split(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Vertices (B, V, D) in their order in x, and hyperedges (B, m, D), primary ones first."""
        begin, end = layout.prefix_slice(EDGE).start, layout.prefix_slice(VIRTUAL_EDGE).stop
        return torch.cat([x[:, :begin], x[:, end:]], 1), x[:, begin:end]

    def membership(self, x: Tensor, layout: TokenLayout) -> Membership:
        """Of the vertices of x in its hyperedges, as this block sees them before anything else."""
        vertices, edges = self.split(x, layout)
        return self._link(self.vertex_norms[0](vertices), self.edge_norms[0](edges), layout)

    def forward(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        if layout.tap is not None:
            x = layout.tap("resid_pre", x, self.depth_index, layout)
        x, layout = self._begin(x, layout)
        vertices, edges = self.split(x, layout)
        sizes = log_sizes(layout, vertices)
        if sizes is not None:
            sizes = F.pad(sizes, (vertices.shape[1] - sizes.shape[1], 0))
        normed, queries = self.vertex_norms[0](vertices), self.edge_norms[0](edges)
        links = self._link(normed, queries, layout)
        bias = None if sizes is None else sizes[:, None, None]
        vertices = vertices + self.drop_path(self.between(normed, normed, bias, shared_edge(links.hard).unsqueeze(1)))
        normed = self.vertex_norms[1](vertices)
        edges = edges + self.drop_path(aggregate(self.aggregate, queries, normed, links, sizes))
        update = distribute(self.distribute, normed, self.edge_norms[1](edges), links)
        vertices = vertices + self.drop_path(update)
        vertices = vertices + self.drop_path(self.vertex_mlp(self.vertex_norms[2](vertices)))
        edges = edges + self.drop_path(self.edge_mlp(self.edge_norms[2](edges)))
        if self.training:
            self._regularise(vertices, edges, links, layout)
        begin = layout.prefix_slice(EDGE).start
        x = torch.cat([vertices[:, :begin], edges, vertices[:, begin:]], 1)
        if layout.tap is not None:
            x = layout.tap("resid_post", x, self.depth_index, layout)
        return x, layout

    def _begin(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        """Put the learned states behind the other prefix tokens, unless an earlier block has."""
        if EDGE in dict(layout.prefix):
            return x, layout
        if self.states is None:
            raise BadInput(
                f"Block {self.depth_index} found no hyperedges among its tokens: they come from block {self.first}, "
                f"which is no hgvt-block or was left out. Give first= the index of the first hgvt-block."
            )
        num_prefix = layout.num_prefix
        x = torch.cat([x[:, :num_prefix], self.states.expand(x.shape[0], -1, -1).to(x.dtype), x[:, num_prefix:]], 1)
        for name, count in self.counts.items():
            layout = layout.with_prefix(name, count)
        return x, layout

    def _link(self, vertices: Tensor, edges: Tensor, layout: TokenLayout) -> Membership:
        row = torch.arange(vertices.shape[1], device=vertices.device).unsqueeze(1)
        virtual = layout.prefix_slice(VIRTUAL)
        is_virtual = (row >= virtual.start) & (row < virtual.stop)
        is_primary = torch.arange(edges.shape[1], device=edges.device) < dict(layout.prefix)[EDGE]
        allowed = is_virtual | is_primary
        if layout.valid is not None:
            real = F.pad(layout.valid, (vertices.shape[1] - layout.valid.shape[1], 0), value=True)
            allowed = allowed & real.unsqueeze(2)
        return self.adjacency(vertices, edges, allowed)

    def _regularise(self, vertices: Tensor, edges: Tensor, links: Membership, layout: TokenLayout) -> None:
        if self.diversity:
            both = mean_squared_cosine(vertices[:, layout.prefix_slice(VIRTUAL)]) + mean_squared_cosine(edges)
            layout.aux["diversity", self.depth_index] = self.diversity * both
        if self.population:
            layout.aux["population", self.depth_index] = self.population * population_loss(links)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={count}" for name, count in self.counts.items())


def shared_edge(hard: Tensor) -> Tensor:
    """Which vertices may see each other, (B, V, V) bool: those of a common hyperedge, and each itself."""
    counts = hard.to(torch.float32)
    same = torch.eye(hard.shape[1], dtype=torch.bool, device=hard.device)
    return (counts @ counts.transpose(1, 2) > 0) | same


def mean_squared_cosine(tokens: Tensor) -> Tensor:
    """Mean of cos² over pairs of different tokens (B, n, D): 0 if orthogonal, 1 if parallel; 0 for a single token."""
    n = tokens.shape[1]
    if n < 2:
        return tokens.new_zeros(())
    tokens = F.normalize(tokens, dim=-1)
    cosine = tokens @ tokens.transpose(1, 2)
    off = ~torch.eye(n, dtype=torch.bool, device=tokens.device)
    return (cosine.square() * off).sum((1, 2)).mean() / (n * (n - 1))


def population_loss(links: Membership) -> Tensor:
    """``ReLU(β − s)² + ReLU(s − γ)²``, mean over hyperedges and images; s is the mean of A over allowed vertices."""
    (low, high), soft = POPULATION, links.soft
    open_to = torch.ones_like(soft) if links.allowed is None else links.allowed.to(soft.dtype).expand_as(soft)
    share = soft.sum(1) / open_to.sum(1).clamp(min=1)
    return (F.relu(low - share).square() + F.relu(share - high).square()).mean()
