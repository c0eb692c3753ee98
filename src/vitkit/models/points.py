"""Clouds of points as tokens: centres spread over the cloud, a neighbourhood around each, and one vector for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.graph import gather_rows

# B batch · n points · G groups (tokens) · k points of a group · D channels


@torch.no_grad()
def sorted_points(points: Tensor) -> Tensor:
    """The numbers (B, n) of points (B, n, 3) by x, then y, then z: the same sequence whatever order they come in."""
    order = points[..., 2].argsort(dim=1, stable=True)
    for axis in (1, 0):
        order = order.gather(1, points[..., axis].gather(1, order).argsort(dim=1, stable=True))
    return order


@torch.no_grad()
def farthest_points(points: Tensor, count: int) -> Tensor:
    """Points that cover a cloud: each is the one farthest from all chosen before it.

    The first is the one farthest from the mean of the cloud, so nothing is drawn; of equally far ones the first is
    taken. Every choice depends on all before, hence a loop of ``count`` steps; each is vectorised over clouds and
    points, and costs B·n.

    >>> farthest_points(torch.tensor([[[0.0, 0, 0], [1, 0, 0], [6, 0, 0], [4, 0, 0]]]), 3)
    tensor([[2, 0, 3]])

    Args:
        points: (B, n, 3). count: how many, 1 to n.

    Returns: (B, count) numbers of points.

    Raises: BadInput for another shape or count.
    """
    if points.ndim != 3 or points.shape[2] != 3 or not 1 <= count <= points.shape[1]:
        raise BadInput(
            f"farthest_points takes clouds (B, n, 3) and 1 to n centres; it got {'×'.join(map(str, points.shape))} and "
            f"count={count}."
        )
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    index = (points - points.mean(1, keepdim=True)).square().sum(2).argmax(1)
    chosen = [index]
    gap = torch.full_like(points[..., 0], torch.inf)
    for _ in range(count - 1):
        gap = torch.minimum(gap, (points - gather_rows(points, index.unsqueeze(1))).square().sum(2))
        index = gap.argmax(1)
        chosen.append(index)
    return torch.stack(chosen, 1)


@torch.no_grad()
def nearest_points(centres: Tensor, points: Tensor, k: int) -> Tensor:
    """The k points nearest to each centre, nearest first: centres (B, G, 3), points (B, n, 3) → (B, G, k) numbers.

    Distances are Euclidean, in float32; of equally near points the one with the lowest number comes first.

    Raises: BadInput for k outside 1 to n.
    """
    if not 1 <= k <= points.shape[1]:
        raise BadInput(f"k={k} nearest points must be 1 to {points.shape[1]}, the points of a cloud.")
    gap = torch.cdist(centres.float(), points.float(), compute_mode="donot_use_mm_for_euclid_dist")
    # bits of positive floats sort like the floats; with the number behind them no two keys are equal, so that the
    # choice is the same for every kernel
    key = gap.contiguous().view(torch.int32).long() << 32 | torch.arange(points.shape[1], device=points.device)
    return key.topk(k, dim=-1, largest=False).values & 0xFFFFFFFF


def points_from_images(images: Tensor, num_points: int, relief: float = 0.5) -> Tensor:
    """Pixels of an image as points (x, y, relief · brightness): a picture as a landscape.

    Taken are the ``num_points`` pixels with the largest ``|b − mean b| + |∇b|``: what stands out from the image, and
    edges; b is the mean of the channels. Nothing is drawn at random, and of equal pixels the first in reading order is
    taken. The height of a point is differentiable with respect to its pixel; the choice of pixels is not.

    >>> points_from_images(torch.eye(3).reshape(1, 1, 3, 3), 9).shape
    torch.Size([1, 9, 3])

    Args:
        images: (B, C, H, W). num_points: at most; fewer if there are fewer pixels.
        relief: height of brightness 1, where the longer side of the image is 2 long.

    Returns: (B, min(num_points, H·W), 3); x and y are in [−1, 1] with the middle of the image at 0, y downwards.

    Raises: BadInput for a number below 1.
    """
    if num_points < 1:
        raise BadInput(f"num_points={num_points} of an image must be at least 1.")
    bright = images.mean(1)
    height, width = bright.shape[1:]
    with torch.no_grad():
        b = bright.float()
        padded = F.pad(b.unsqueeze(1), (1, 1, 1, 1), mode="replicate").squeeze(1)
        down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
        right = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
        weight = (b - b.mean((1, 2), keepdim=True)).abs() + (down.square() + right.square()).sqrt()
        index = weight.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :num_points]
    half = max(height, width) / 2
    x = (index % width + 0.5 - width / 2) / half
    y = (torch.div(index, width, rounding_mode="floor") + 0.5 - height / 2) / half
    z = relief * bright.flatten(1).gather(1, index)
    return torch.stack([x.to(z.dtype), y.to(z.dtype), z], 2)


class MiniPointNet(nn.Module):
    """One vector for a set of points: ``W₂ σ(BN(W₁ [h; max h]))``, then the maximum, with ``h`` a small MLP of a point.

    Args:
        dim: D. width: w of the first layer; the next are 2w and 4w wide.

    Shape: (…, k, 3) → (…, D), whatever the order of the k points.
    """

    def __init__(self, dim: int, width: int = 128) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2 * width))
        self.group = nn.Sequential(
            nn.Linear(4 * width, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU(), nn.Linear(4 * width, dim)
        )

    def forward(self, groups: Tensor) -> Tensor:
        shape = groups.shape[:-1]
        h = self.point(groups.reshape(-1, 3)).unflatten(0, (-1, shape[-1]))
        both = torch.cat([h, h.amax(1, keepdim=True).expand_as(h)], 2)
        return self.group(both.flatten(0, 1)).unflatten(0, (-1, shape[-1])).amax(1).unflatten(0, shape[:-1])


class PointGroups(NamedTuple):
    """What :class:`PointTokenizer` makes of clouds.

    Attributes:
        x: (B, G, D), a vector of every neighbourhood.
        position: (B, G, D), of every centre; not yet added.
        centres: (B, G, 3).
        density: (B, G), log of how much denser the neighbourhood is than the others of its cloud.
    """

    x: Tensor
    position: Tensor
    centres: Tensor
    density: Tensor


class PointTokenizer(nn.Module):
    """Farthest-point centres, the k points nearest to each, a mini-PointNet over ``p_j − c_i``, an MLP of the centre.

    The points are sorted first, so that the result is bitwise the same for every order of the input. Centres and
    neighbours are chosen without gradient; coordinates carry it.

    Args:
        dim: D. groups: G, at most; a smaller cloud has one token a point. neighbours: k, at most n.
        width: of the mini-PointNet. position_width: of the hidden layer of the centre's MLP.

    Shape: (B, n, 3) → :class:`PointGroups` with min(G, n) tokens.
    Raises: BadInput for sizes below 1, and for other shapes.
    Paper: the tokens of Point-BERT (arXiv:2111.14819), used by PointMamba (arXiv:2402.10739).
    Departs from the paper: the first centre is the point farthest from the mean, not a random one.
    """

    def __init__(
        self, dim: int, groups: int = 64, neighbours: int = 32, width: int = 128, position_width: int = 128
    ) -> None:
        super().__init__()
        if min(dim, groups, neighbours, width, position_width) < 1:
            raise BadInput(
                f"A point tokenizer needs at least one of each: dim={dim}, groups={groups}, neighbours={neighbours}, "
                f"width={width}, position_width={position_width}."
            )
        self.groups, self.neighbours = groups, neighbours
        self.point_net = MiniPointNet(dim, width)
        self.position = nn.Sequential(nn.Linear(3, position_width), nn.GELU(), nn.Linear(position_width, dim))

    def forward(self, points: Tensor) -> PointGroups:
        if points.ndim != 3 or points.shape[2] != 3 or points.shape[1] < 1:
            raise BadInput(f"Clouds of points are (B, n, 3); here came {'×'.join(map(str, points.shape))}.")
        points = gather_rows(points, sorted_points(points))
        centres = gather_rows(points, farthest_points(points, min(self.groups, points.shape[1])))
        index = nearest_points(centres, points, min(self.neighbours, points.shape[1]))
        around = gather_rows(points, index) - centres.unsqueeze(2)
        # 1e-12: the log and root of a group of equal points
        spread = (around.to(torch.promote_types(points.dtype, torch.float32)).square().sum(3).mean(2) + 1e-12).log() / 2
        density = (spread.mean(1, keepdim=True) - spread).to(points.dtype)
        return PointGroups(self.point_net(around), self.position(centres), centres, density)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, neighbours={self.neighbours}"
