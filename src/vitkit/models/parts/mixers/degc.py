"""Graph convolution on neighbours within clusters, which hear of each other through their centroids."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown
from vitkit.models.cross_attention import CrossAttention, attend_from_prefix
from vitkit.models.graph import cluster_knn, gather_rows, kmeans, knn, max_relative
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

# B batch · P prefix tokens · N patches · C width · k neighbours · c clusters

CONVS = ("mr", "edge", "sage", "gin")


class DEGC(nn.Module):
    """Dynamic Efficient Graph Convolution: k-means per image, kNN within clusters, attention between centroids.

    On ``h = BN(W₁ x)`` of the patches: clusters by k-means and neighbours 𝒩(i) within a cluster, both by direction
    (length-one features, no gradient); centroids c, the means of h, pass through one layer of attention (GATv2) to c';
    then ``u_i = GELU(BN(W [h_i, max_{j∈𝒩(i)}(h_j − h_i), c'_{cluster of i}]))`` of width 2C, and the update is
    ``BN(W₂ u)``. Prefix tokens, which are in no graph, attend to all tokens by ordinary attention.

    Training draws the first centres of k-means anew in every call, evaluation always takes the same nodes.

    Args:
        clusters: c; 1 leaves k-means out: neighbours among all patches, as in Vision GNN. Default 4.
        k: neighbours in the first block, the patch itself among them; grows linearly to 2k in the last. Default 9.
        conv: what is made of the neighbours: "mr" as above; "edge": ``max_j GELU(BN(W [h_i, h_j − h_i, c']))``;
            "sage": ``W [h_i, max_j GELU(BN(W₃ h_j)), c']``; "gin": ``W [(1+ε) h_i + Σ_{j≠i} h_j, c']``.
        centroids: False leaves c' out, and with it everything that crosses clusters.

    Shape: (B, P+N, C) → (B, P+N, C). Works on any set of patches; those with ``valid=False`` are in no cluster.
    Raises: BadInput for ``clusters`` or ``k`` below 1, an unknown ``conv``, or prefix tokens in a host built without.
    Paper: ClusterViG: Efficient Globally Aware Vision GNNs via Image Partitioning, arXiv:2501.10640.
    Departs from the paper: prefix tokens, padding and the same first centres in evaluation are ours. The depthwise 7×7
        position code is the backbone's, not the mixer's, as a host has positions of its own.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True
    compile_note = "blocks of nodes are as long as the largest clusters of the batch, which only the data say"
    export_note = compile_note

    def __init__(
        self,
        dim: int,
        clusters: int = 4,
        k: int = 9,
        conv: str = "mr",
        centroids: bool = True,
        prefix: CrossAttention | None = None,
    ) -> None:
        super().__init__()
        if clusters < 1 or k < 1:
            raise BadInput(f"clusters={clusters} and k={k} must be at least 1; the paper has 4 and 9.")
        if conv not in CONVS:
            raise unknown("graph convolution", conv, CONVS, "vitkit show degc")
        self.clusters, self.k, self.conv = clusters, k, conv
        # a bias would be taken out again by the batch norm
        self.fc1, self.norm1 = nn.Linear(dim, dim, bias=False), TokenBatchNorm(dim)
        self.between = CentroidAttention(dim) if centroids else None
        if conv == "sage":
            self.message: nn.Module = nn.Linear(dim, dim, bias=False)
            self.message_norm = TokenBatchNorm(dim)
        if conv == "gin":
            self.epsilon = nn.Parameter(torch.zeros(()))
        width = dim * ((1 if conv == "gin" else 2) + int(centroids))
        self.vertex, self.vertex_norm = nn.Linear(width, 2 * dim, bias=False), TokenBatchNorm(2 * dim)
        self.fc2, self.norm2 = nn.Linear(2 * dim, dim, bias=False), TokenBatchNorm(dim)
        self.prefix = prefix

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        clusters: int = 4,
        k: int = 9,
        conv: str = "mr",
        centroids: bool = True,
    ) -> DEGC:
        prefix = None
        if spec.num_prefix:
            prefix = CrossAttention.like(old if warm else None, spec.dim, spec.num_heads)
        return cls(spec.dim, clusters, neighbours_at(spec.depth or 0, spec.num_blocks, k), conv, centroids, prefix)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        update = self.convolve(x[:, layout.num_prefix :], layout.valid)
        first = attend_from_prefix(self.prefix, x, layout, "degc")
        return torch.cat([first.to(update.dtype), update], 1)

    def graph(self, h: Tensor, valid: Tensor | None = None, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Labels (B, N), −1 for padding, and neighbours (B, N, k) of features h (B, N, C).

        Args:
            initial: first centres of k-means, see :func:`vitkit.models.graph.kmeans`.
        """
        clusters = min(self.clusters, h.shape[1])
        if clusters == 1:
            labels = torch.zeros(h.shape[:2], dtype=torch.long, device=h.device)
            return labels if valid is None else labels.masked_fill(~valid, -1), knn(h, self.k, valid)
        labels, _ = kmeans(h.detach(), clusters, initial, shuffle=self.training, valid=valid)
        return labels, cluster_knn(h.detach(), labels, clusters, self.k)

    def convolve(self, patches: Tensor, valid: Tensor | None = None, initial: Tensor | None = None) -> Tensor:
        """The update of the patches alone, (B, N, C) → (B, N, C)."""
        h = self.norm1(self.fc1(patches), valid)
        labels, neighbours = self.graph(h, valid, initial)
        found = self._aggregate(h, neighbours, valid)
        if self.between is not None:
            centroid = gather_rows(self.between(*_centroids(h, labels, self.clusters)), labels.clamp(min=0))
            if self.conv == "edge":
                centroid = centroid.unsqueeze(2).expand(-1, -1, found.shape[2], -1)
            found = torch.cat([found, centroid], -1)
        if self.conv == "edge":
            over = None if valid is None else valid.unsqueeze(2).expand(found.shape[:3])
            u = F.gelu(self.vertex_norm(self.vertex(found), over)).amax(2)
        else:
            u = F.gelu(self.vertex_norm(self.vertex(found), valid))
        return self.norm2(self.fc2(u), valid)

    def _aggregate(self, h: Tensor, neighbours: Tensor, valid: Tensor | None) -> Tensor:
        """A node beside its neighbours: (B, N, 2C), for "gin" (B, N, C), for "edge" (B, N, k, 2C)."""
        if self.conv == "mr":
            return torch.stack([h, max_relative(h, neighbours)], -1).flatten(2)
        if self.conv == "sage":
            message = F.gelu(self.message_norm(self.message(h), valid))
            return torch.cat([h, max_relative(message, neighbours) + message], -1)
        around = gather_rows(h, neighbours)
        if self.conv == "edge":
            own = h.unsqueeze(2).expand_as(around)
            return torch.cat([own, around - own], -1)
        other = neighbours != torch.arange(h.shape[1], device=h.device).unsqueeze(1)
        return (1 + self.epsilon) * h + (around * other.unsqueeze(-1)).sum(2)

    def extra_repr(self) -> str:
        return f"clusters={self.clusters}, k={self.k}, conv={self.conv!r}"


class CentroidAttention(nn.Module):
    """GATv2 on the complete graph of an image's centroids: ``c'_i = Σ_j α_ij W_l c_j``.

    ``α_ij = softmax_j(a · LeakyReLU(W_l c_j + W_r c_i))`` with slope 0.2.

    Shape: centroids (B, c, C), present (B, c) bool → (B, c, C); an absent centroid is nobody's neighbour.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        # a bias of what is summed would be the same for all nodes, which the batch norm behind takes out again
        self.source, self.target = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.score = nn.Linear(dim, 1, bias=False)

    def forward(self, centroids: Tensor, present: Tensor) -> Tensor:
        source = self.source(centroids)
        pairs = F.leaky_relu(self.target(centroids).unsqueeze(2) + source.unsqueeze(1), 0.2)
        logits = self.score(pairs).squeeze(-1)
        logits = logits.masked_fill(~present.unsqueeze(1), torch.finfo(logits.dtype).min)
        return logits.softmax(-1) @ source


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over all tokens of all images: (…, C) → (…, C), padding (``valid`` False) outside its statistics."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        if valid is None:
            return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return torch.zeros_like(x).masked_scatter(valid.unsqueeze(-1), super().forward(x[valid]))


def neighbours_at(depth: int, num_blocks: int, k: int) -> int:
    """From k in the first block to 2k in the last."""
    return k + k * depth // max(1, num_blocks - 1)


def _centroids(h: Tensor, labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Means of the members' features (B, c, C), and which clusters have members (B, c)."""
    hot = (labels.unsqueeze(1) == torch.arange(num_clusters, device=h.device).unsqueeze(1)).to(h.dtype)
    counts = hot.sum(-1, keepdim=True)
    return hot @ h / counts.clamp(min=1), counts.squeeze(-1) > 0
