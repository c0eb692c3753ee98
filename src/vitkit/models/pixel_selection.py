"""Choosing the few pixels of an image that are worth attention, and learning to choose them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput

# B images · C channels · H×W pixels · k chosen pixels · D embedding

# the paper's rule: by how much the number of pixels changes, as a fraction of small whole numbers
_SHRINK, _GROW = (9, 10), (11, 10)


class Selection(NamedTuple):
    """The pixels that were chosen, in raster order.

    Attributes:
        pixels: (B, k) long, row·W + column.
        scores: (B, k) float32, F at these pixels; the gates are their sigmoid.
        size: (H, W).
    """

    pixels: Tensor
    scores: Tensor
    size: tuple[int, int]

    @property
    def coords(self) -> Tensor:
        """(B, k, 2) centres as (row, column) in [0, 1]."""
        height, width = self.size
        row, col = self.pixels // width, self.pixels % width
        return torch.stack([(row + 0.5) / height, (col + 0.5) / width], dim=-1)

    def to_map(self) -> Tensor:
        """(B, H, W) bool, True where a pixel was chosen."""
        flat = torch.zeros(len(self.pixels), self.size[0] * self.size[1], dtype=torch.bool, device=self.pixels.device)
        return flat.scatter(1, self.pixels, True).unflatten(1, self.size)


class PixelScorer(nn.Module):
    """A small convolutional net that scores every pixel: 3×3 to 8 channels, 3×3 to 16, 1×1 to the score F.

    A score sees 5×5 pixels. The gate of a pixel is A = σ(F).

    Shape: images (B, C, H, W) → F (B, H, W), float32.
    """

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_chans, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 1, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).squeeze(1).float()


class PixelEmbedding(nn.Module):
    """``e = MLP(row, column, value)``: the place and the channels of a pixel as a token.

    With ``bands`` = b > 0, sin and cos of π·2^j·(row, column), j < b, join the numbers.

    Shape: values (B, k, C), coords (B, k, 2) in [0, 1] → (B, k, D).
    """

    def __init__(self, in_chans: int, dim: int, bands: int = 4) -> None:
        super().__init__()
        self.bands = bands
        self.fc1, self.act, self.fc2 = nn.Linear(2 + 4 * bands + in_chans, dim), nn.GELU(), nn.Linear(dim, dim)
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, values: Tensor, coords: Tensor) -> Tensor:
        coords = coords.to(torch.float32)
        parts = [coords]
        if self.bands:
            waves = math.pi * 2.0 ** torch.arange(self.bands, device=coords.device)
            angles = (coords.unsqueeze(-1) * waves).flatten(-2)
            parts += [angles.sin(), angles.cos()]
        x = torch.cat([*(part.to(values.dtype) for part in parts), values], dim=-1)
        return self.fc2(self.act(self.fc1(x)))


class PixelSelector(nn.Module):
    """Scores all pixels, chooses k of them and embeds these: what both forms of SparseAttnNet begin with.

    Args:
        in_chans: C. dim: D. budget: says how large k is.
        explore: share ε of the k that is drawn at random in training, with probabilities proportional to A, from the
            pixels that are not among the k(1 − ε) best.
        bands: see :class:`PixelEmbedding`.

    Raises: BadInput if ``explore`` is not in [0, 1) or ``bands`` negative.
    """

    def __init__(self, in_chans: int, dim: int, budget: PixelBudget, explore: float = 0.1, bands: int = 4) -> None:
        super().__init__()
        if not 0 <= explore < 1 or bands < 0:
            raise BadInput(f"explore={explore} must be in [0, 1) and bands={bands} 0 or more.")
        self.in_chans, self.explore = in_chans, explore
        self.scorer = PixelScorer(in_chans)
        self.embedding = PixelEmbedding(in_chans, dim, bands)
        self.budget = budget

    def select(self, images: Tensor) -> Selection:
        """Score all pixels and choose; at random only in training."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise BadInput(
                f"This selection of pixels was built for images (B, {self.in_chans}, H, W), but got "
                f"{tuple(images.shape)}."
            )
        scores = self.scorer(images)
        size = (scores.shape[1], scores.shape[2])
        scores = scores.flatten(1)
        index = choose(scores.detach(), self.budget.for_size(*size), self.explore if self.training else 0.0)
        return Selection(index, scores.gather(1, index), size)

    def embed(self, images: Tensor, chosen: Selection) -> Tensor:
        """Tokens (B, k, D) of the chosen pixels, each multiplied by its gate."""
        values = images.flatten(2).gather(2, chosen.pixels.unsqueeze(1).expand(-1, images.shape[1], -1)).transpose(1, 2)
        gates = chosen.scores.sigmoid().unsqueeze(-1)
        tokens = self.embedding(values, chosen.coords)
        return tokens * gates.to(tokens.dtype)


def choose(scores: Tensor, count: int, explore: float = 0.0) -> Tensor:
    """Indices (B, k) of the largest scores (B, N), ascending; of equal scores the one that comes first.

    >>> choose(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 2), choose(torch.zeros(1, 4), 2)
    (tensor([[1, 3]]), tensor([[0, 1]]))

    Args:
        scores: logits F. count: k, at most N.
        explore: share of k that is drawn from the others instead, without replacement, with probabilities proportional
            to σ(F), by torch's global generator.
    """
    drawn = min(round(explore * count), scores.shape[1] - count)
    best = _largest(scores, count - drawn)
    if drawn > 0:
        # Gumbel noise on log-probabilities: the largest are a draw without replacement
        noise = -torch.empty_like(scores).exponential_().clamp(min=1e-20).log()
        keys = (F.logsigmoid(scores) + noise).scatter(1, best, -math.inf)
        best = torch.cat([best, keys.topk(drawn, dim=1).indices], dim=1)
    return best.sort(dim=1).values


def _largest(scores: Tensor, count: int) -> Tensor:
    """What a stable descending sort puts first, (B, count) in no order; ``topk`` alone leaves open which of equals."""
    num = scores.shape[1]
    least = scores.topk(max(count, 1), dim=1).values[:, -1:]
    turn = torch.arange(num, 0, -1, device=scores.device)
    above = (scores > least) | (scores.isnan() & ~least.isnan())
    tied = (scores == least) | (scores.isnan() & least.isnan())
    key = torch.where(above, turn + num, torch.where(tied, turn, 0))
    return key.topk(count, dim=1).indices


def distillation(weights: Tensor, scores: Tensor) -> Tensor:
    """How far the scorer is from what attention made of its choice: mean over images of ``KL(w ‖ softmax F)``.

    Args:
        weights: (B, k) attention to the chosen pixels; any scale, no gradient flows into it.
        scores: (B, k) F at the same pixels.

    Returns: a scalar in nats, 0 where both distributions are equal.
    """
    w = weights.detach().float()
    w = w / w.sum(1, keepdim=True).clamp(min=1e-12)
    return (torch.special.xlogy(w, w) - w * F.log_softmax(scores.float(), dim=1)).sum(1).mean()


def next_count(count: int, before: float, now: float, least: int, most: int, tolerance: float) -> int:
    """k after a comparison: 0.9k where the loss fell by more than ``tolerance`` of itself, else 1.1k.

    >>> next_count(100, 1.0, 0.9, 10, 200, 0.01), next_count(100, 1.0, 1.0, 10, 200, 0.01)
    (90, 110)

    Rounded away from k, so that it always moves, up to the bounds.
    """
    if before - now > tolerance * abs(before):
        return max(least, count * _SHRINK[0] // _SHRINK[1])
    return min(most, -(-count * _GROW[0] // _GROW[1]))


class PixelBudget(nn.Module):
    """How many pixels are chosen: a schedule that follows the training loss.

    A moving average m ← (m + loss)/2 of the epochs' mean training loss is compared with itself ``every`` epochs before:
    relative improvement above ``tolerance`` makes k smaller (0.9k, not below the least), anything else larger (1.1k,
    not above the most). In the last quarter of the epochs k is frozen. A training loop calls ``on_epoch(epoch, total,
    loss)``; without a loss k stays. k and the averages are buffers, so a checkpoint keeps them.

    Args:
        size: (H, W) of the images that k counts; on others it is scaled with the number of pixels.
        share: k at the start over H·W, in (0, 1].
        least, most: bounds of that share; None: the sixth part and 5/3 of ``share``, at most 1.
        every: epochs between comparisons. tolerance: τ.
        adaptive: False keeps k.

    Attributes: count: k, a plain int, so that shapes are known before a forward.
    Raises: BadInput if a share, ``every`` or ``tolerance`` is out of range.
    """

    k: Tensor
    seen: Tensor
    losses: Tensor

    def __init__(
        self,
        size: tuple[int, int],
        share: float,
        least: float | None = None,
        most: float | None = None,
        every: int = 2,
        tolerance: float = 0.01,
        adaptive: bool = True,
    ) -> None:
        super().__init__()
        least = share / 6 if least is None else least
        most = min(1.0, share * 5 / 3) if most is None else most
        if not 0 < least <= share <= most <= 1:
            raise BadInput(
                f"least={least:g}, share={share:g}, most={most:g} are shares of the pixels and must be in this order "
                "between 0 and 1, such as 0.05, 0.3, 0.5."
            )
        if every < 1 or not tolerance >= 0:
            raise BadInput(f"every={every} epochs must be at least 1 and tolerance={tolerance} not negative.")
        self.pixels = size[0] * size[1]
        self.least, self.most = (max(1, round(s * self.pixels)) for s in (least, most))
        self.every, self.tolerance, self.adaptive = every, tolerance, adaptive
        self.count = max(1, round(share * self.pixels))
        self.register_buffer("k", torch.tensor(self.count))
        self.register_buffer("seen", torch.tensor(0))
        # the moving average, and what it was at the last comparison
        self.register_buffer("losses", torch.zeros(2))

    @property
    def share(self) -> float:
        """k over the number of pixels."""
        return self.count / self.pixels

    def for_size(self, height: int, width: int) -> int:
        """k for images of another size."""
        if height * width == self.pixels:
            return self.count
        return max(1, round(self.count * height * width / self.pixels))

    def set(self, count: int) -> None:
        """Choose ``count`` pixels from now on.

        Raises: BadInput if there are not so many.
        """
        if not 1 <= count <= self.pixels:
            raise BadInput(f"{count} pixels cannot be chosen of {self.pixels}.")
        self.count = count
        self.k.fill_(count)

    def on_epoch(self, epoch: int, total: int, loss: float | None = None) -> None:
        """Before epoch ``epoch`` (from 0) of ``total``, with the mean training loss of the one before it."""
        if loss is None or not self.adaptive or not math.isfinite(loss):
            return
        seen = int(self.seen) + 1
        average = loss if seen == 1 else (float(self.losses[0]) + loss) / 2
        before = float(self.losses[1])
        if seen > 1 and seen % self.every == 0 and epoch < 0.75 * total:
            self.set(next_count(self.count, before, average, self.least, self.most, self.tolerance))
        self.seen.fill_(seen)
        self.losses[0] = average
        if seen == 1 or seen % self.every == 0:
            self.losses[1] = average

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.k.is_meta:
            self.count = int(self.k)

    def extra_repr(self) -> str:
        return f"count={self.count} of {self.pixels}, adaptive={self.adaptive}"
