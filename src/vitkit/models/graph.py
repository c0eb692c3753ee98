"""Operations on graphs and hypergraphs between tokens: dense, for all images of a batch at once.

Neighbours are found by ``topk`` on cosine similarities, so nothing but torch is needed. Indices and labels carry no
gradient; features gathered by them do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# B batch · N nodes (tokens) · D or C width · k neighbours, or members of a hyperedge · M hyperedges · c clusters
# R restarts of k-means · n nodes of a cluster

#: batched products in which clusters of unequal size are compared; more of them pad less and start more kernels
SIZE_CLASSES = 8

_MAX = 2  # torch.embedding_bag's number for it


def unit(x: Tensor) -> Tensor:
    """Rows of length one, in at least float32: what similarities are measured on."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of each image by index: x (B, N, C), index (B, …) in [0, N) → (B, …, C)."""
    batch, num_rows, width = x.shape
    base = num_rows * torch.arange(batch, device=x.device).reshape(batch, *(1,) * (index.ndim - 1))
    # whole rows of one flat table are copied; `gather` would look up every single number
    return x.reshape(-1, width).index_select(0, (index + base).flatten()).reshape(*index.shape, width)


@torch.no_grad()
def knn(x: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """The k nearest nodes of every node by cosine similarity, itself first.

    Args:
        x: features (B, N, D).
        k: neighbours, the node itself among them; at most N are given.
        valid: (B, N) bool; False for nodes that may not be neighbours.

    Returns: indices (B, N, min(k, N)); a node with fewer neighbours than that has itself in the remaining places.
    """
    x = unit(x)
    similarity = x @ x.transpose(1, 2)
    if valid is not None:
        similarity.masked_fill_(~valid.unsqueeze(1), -math.inf)
    # equal directions are as near as the node itself
    similarity.diagonal(dim1=1, dim2=2).fill_(math.inf)
    best, index = similarity.topk(min(k, x.shape[1]), dim=-1)
    if valid is None:
        return index
    return torch.where(best > -math.inf, index, torch.arange(x.shape[1], device=x.device).unsqueeze(1))


@torch.no_grad()
def cluster_knn(x: Tensor, labels: Tensor, num_clusters: int, k: int) -> Tensor:
    """The k nearest nodes of every node within its cluster, itself first.

    The clusters of all images are sorted by size and compared in :data:`SIZE_CLASSES` batched products, each padded to
    its own largest: little more than ``Σ n²`` similarities in place of N² per image.

    Args:
        x: features (B, N, D). labels: cluster of every node (B, N) in [0, c), −1 for padding.
        num_clusters: c. k: neighbours, the node itself among them.

    Returns: indices (B, N, min(k, n)); a node of a cluster with fewer nodes has itself in the remaining places.
    """
    batch, num_nodes, dim = x.shape
    device, num_groups = x.device, batch * num_clusters
    image = torch.arange(batch, device=device).unsqueeze(1)
    group = torch.where(labels < 0, num_groups, image * num_clusters + labels).flatten()
    counts = torch.zeros(num_groups + 1, dtype=torch.long, device=device).scatter_add_(0, group, torch.ones_like(group))
    sizes, by_size = counts[:-1].sort(descending=True, stable=True)
    starts = sizes.cumsum(0) - sizes
    place = torch.empty_like(counts).scatter_(0, by_size, torch.arange(num_groups, device=device))
    place[-1] = num_groups
    # nodes of all images, those of the largest cluster first and padding last: a cluster is a run of its nodes
    owner, order = place[group].sort(stable=True)
    features = unit(x).reshape(-1, dim).index_select(0, order)
    size_of = sizes.tolist()
    itself = torch.arange(batch * num_nodes, device=device).unsqueeze(1)
    result = itself.repeat(1, max(1, min(k, size_of[0])))
    begin, per_class = 0, -(-num_groups // SIZE_CLASSES)
    for first in range(0, num_groups, per_class):
        largest, end = size_of[first], begin + sum(size_of[first : first + per_class])
        if not largest:
            break
        mine = owner[begin:end]
        start, size = starts[mine].unsqueeze(1), sizes[mine].unsqueeze(1)
        rank = itself[begin:end] - start
        slot = ((mine - first) * largest).unsqueeze(1) + rank
        blocks = features.new_zeros(min(per_class, num_groups - first) * largest, dim)
        blocks = blocks.index_copy_(0, slot[:, 0], features[begin:end]).unflatten(0, (-1, largest))
        similarity = (blocks @ blocks.transpose(1, 2)).flatten(0, 1).index_select(0, slot[:, 0])
        absent = torch.arange(largest, device=device) >= size
        # equal directions are as near as the node itself
        similarity.masked_fill_(absent, -math.inf).scatter_(1, rank, math.inf)
        inside = similarity.topk(min(k, largest), dim=-1).indices
        nodes = order[torch.where(inside < size, inside, rank) + start]
        result[order[begin:end], : nodes.shape[1]] = nodes
        begin = end
    return result.reshape(batch, num_nodes, -1) - num_nodes * image.unsqueeze(2)


def max_relative(x: Tensor, neighbours: Tensor) -> Tensor:
    """``max_j (x_j − x_i)`` over the neighbours j of i, channel by channel: x (B, N, C), (B, N, k) → (B, N, C)."""
    batch, num_nodes, width = x.shape
    flat, k = x.reshape(-1, width), neighbours.shape[-1]
    image = num_nodes * torch.arange(batch, device=x.device).reshape(-1, 1, 1)
    with torch.no_grad():
        # says which neighbour wins in which channel without laying out all (B, N, k, C) of them: a third of the time
        # of a training step, and unlike the bag's own backward what follows can be differentiated twice
        begin = torch.arange(0, neighbours.numel(), k, device=x.device)
        winner = torch.embedding_bag(flat.detach(), (neighbours + image).flatten(), begin, False, _MAX, False)[3]
    return flat.gather(0, winner).reshape(x.shape) - x


def incidence(members: Tensor, num_nodes: int, valid: Tensor | None = None) -> Tensor:
    """H (B, N, M) with H_ij = 1 where node i is in hyperedge j: members (B, M, k) are the nodes of every edge.

    Args:
        members: node indices. num_nodes: N. valid: (B, N) bool; False for nodes that are in no hyperedge.
    """
    batch, num_edges, _ = members.shape
    hot = torch.zeros(batch, num_edges, num_nodes, device=members.device).scatter_(2, members, 1.0)
    if valid is not None:
        hot = hot * valid.unsqueeze(1)
    return hot.transpose(1, 2)


def normalised_incidence(h: Tensor) -> Tensor:
    """``D_v^{−1/2} H D_e^{−1/2}`` with the degrees of nodes and of edges; 0 for a node in no edge: (B, N, M)."""
    return h * h.sum(2, keepdim=True).clamp(min=1).rsqrt() * h.sum(1, keepdim=True).clamp(min=1).rsqrt()


def scattered(
    num: int, num_nodes: int, device: torch.device, rows: int = 1, shuffle: bool = False, valid: Tensor | None = None
) -> Tensor:
    """``num`` nodes without order among N: (1 or B, rows, num) indices.

    Args:
        rows: independent choices. shuffle: draw anew in every call; False: always the same ones.
        valid: (B, N) bool; others are taken only if there are too few of these. The choice is then one of each image.
    """
    if shuffle:
        key = torch.rand(rows, num_nodes, device=device)
    else:
        # a hash of node and row: the same on all devices and with or without padding behind, and no generator, which a
        # compiled graph could not hold
        key = torch.arange(1, num_nodes + 1, device=device) + 1000003 * torch.arange(rows, device=device).unsqueeze(1)
        key = key * 2654435761 % 2**32
        key = ((key >> 15) ^ key) * 1540483477 % 2**32 / 2**32
    if valid is not None:
        key = key + (~valid).unsqueeze(1)
    return (key if key.ndim == 3 else key.unsqueeze(0)).argsort(dim=-1, stable=True)[..., :num]


@torch.no_grad()
def kmeans(
    x: Tensor,
    num_clusters: int,
    initial: Tensor | None = None,
    restarts: int = 2,
    steps: int = 25,
    tol: float = 1e-3,
    shuffle: bool = False,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """k-means on features of length one, every image for itself, the best of some restarts.

    Alternates ``label_i = argmin_j ‖x̂_i − μ_j‖²`` and ``μ_j = mean of its members``. A centre without members stays
    where it is. An image stops when the mean squared move of its centres is at most ``tol``, whatever the others do.

    Args:
        x: (B, N, D). num_clusters: c, at most N.
        initial: first centres (1 or B, restarts, c, D); None: some of the nodes, see :func:`scattered`.
        restarts: R. steps: at most. tol: see above. shuffle: draw the first centres anew in every call.
        valid: (B, N) bool; False for nodes that belong to no cluster.

    Returns: labels (B, N), −1 where not valid; centres (B, c, D).
    """
    x = unit(x)
    batch, num_nodes = x.shape[:2]
    if initial is None:
        index = scattered(num_clusters, num_nodes, x.device, restarts, shuffle, valid)
        initial = gather_rows(x, index.expand(batch, -1, -1))
    restarts, num_clusters = initial.shape[1:3]
    centres = initial.to(x.dtype).expand(batch, -1, -1, -1)
    weight = None if valid is None else valid.to(x.dtype).reshape(batch, 1, 1, num_nodes)
    active = torch.ones(batch, restarts, 1, 1, dtype=torch.bool, device=x.device)
    live, points, result = torch.arange(batch, device=x.device), x, centres.clone()
    for _ in range(steps):
        labels = _affinity(points, centres).max(2, keepdim=True).indices
        hot = torch.zeros(points.shape[0], restarts, num_clusters, num_nodes, dtype=x.dtype, device=x.device)
        hot = hot.scatter_(2, labels, 1.0) if weight is None else hot.scatter_(2, labels, 1.0) * weight[live]
        counts = hot.sum(-1, keepdim=True)
        sums = (hot.flatten(1, 2) @ points).unflatten(1, (restarts, -1))
        found = torch.where(active & (counts > 0), sums / counts.clamp(min=1), centres)
        active = active & ((found - centres).square().sum(3, keepdim=True).mean(2, keepdim=True) > tol)
        centres = found
        # a compiled graph has no early end; what has stopped does not move any more, so the result is the same
        if torch.compiler.is_compiling():
            continue
        going = active.flatten(1).any(1)
        num_going = int(going.sum())
        if not num_going:
            break
        if 2 * num_going <= len(live):
            result[live] = centres
            live, points, centres, active = live[going], points[going], centres[going], active[going]
    result[live] = centres
    best, labels = _affinity(x, result).max(2)
    # ½‖x̂‖² is missing in all, so the largest sum is the smallest squared distance
    chosen = (best if weight is None else best * weight.squeeze(2)).sum(2).argmax(1)
    image = torch.arange(batch, device=x.device)
    labels = labels[image, chosen]
    return (labels if valid is None else labels.masked_fill(~valid, -1)), result[image, chosen]


def _affinity(x: Tensor, centres: Tensor) -> Tensor:
    """``μ·x − ½‖μ‖²`` (B, R, c, N) of centres (B, R, c, D): largest where the distance is smallest."""
    flat = centres.flatten(1, 2)
    # centres by nodes, not the other way round: few columns would make the product several times slower on a CPU
    similarity = torch.baddbmm(-0.5 * flat.square().sum(-1, keepdim=True), flat, x.transpose(1, 2))
    return similarity.unflatten(1, (centres.shape[1], -1))
