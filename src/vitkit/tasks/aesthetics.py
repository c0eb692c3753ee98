"""How good people find an image: one mean score, or how their ratings spread."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

# B images · K rating levels · P+N tokens of width D

_IMAGE_NAMES = ("image", "image_name", "imagename", "image_id", "path", "file", "filename", "name", "id")
_SCORE_NAMES = ("score", "mos", "mean_score", "mean", "rating", "label", "aesthetic_score")
_SUFFIXES = ("", ".jpg", ".jpeg", ".png", ".bmp", ".webp")


class Aesthetics:
    """Rating of images: a mean score by squared error, or the histogram of ratings by earth mover's distance.

    Mean scores: ``mean((σ(o) − (y − low)/(high − low))²)``. Histograms (``levels`` given): with cumulative sums F of
    softmax(o) and of the target, ``EMD = ((1/K) Σ_k |F̂_k − F_k|^r)^{1/r}``, mean over images. In float32.

    >>> task = Aesthetics(low=1, high=5)
    >>> task.predict(torch.zeros(1, 1))
    tensor([3.])

    Args:
        low, high: ends of the rating scale; targets of mean scores lie between them.
        levels: K rating levels, equally spaced from ``low`` to ``high``; None: mean scores.
        power: r of the earth mover's distance, at least 1.

    Raises: BadInput if an argument or a batch of labels does not fit.
    Paper: Charm: The Missing Piece in ViT fine-tuning for Image Aesthetic Assessment, arXiv:2504.02522.
    """

    main_metric = "srcc"

    def __init__(self, low: float = 0.0, high: float = 1.0, levels: int | None = None, power: float = 2.0) -> None:
        if not low < high or (levels is not None and levels < 2) or power < 1:
            raise BadInput(f"low={low} < high={high}, levels={levels} ≥ 2 and power={power} ≥ 1 must hold.")
        self.low, self.high, self.levels, self.power = float(low), float(high), levels, float(power)

    @property
    def num_outputs(self) -> int:
        return self.levels or 1

    def loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        """Outputs (B, 1) or (B, K) and ``batch["labels"]``, (B,) scores or (B, K) ratings of any total → scalar."""
        labels = batch["labels"].float()
        if self.levels is None:
            if labels.shape not in ((len(outputs),), (len(outputs), 1)):
                raise BadInput(f"Labels of shape {tuple(labels.shape)} are not one score for each of {len(outputs)}.")
            target = (labels.reshape(-1) - self.low) / (self.high - self.low)
            return (outputs.float().sigmoid()[:, 0] - target).square().mean()
        return emd(outputs.float().softmax(-1), self._shares(labels), self.power).mean()

    def predict(self, outputs: Tensor) -> Tensor:
        """Outputs (B, 1) or (B, K) → mean scores (B,) between ``low`` and ``high``."""
        if self.levels is None:
            return self.low + (self.high - self.low) * outputs.float().sigmoid()[:, 0]
        return outputs.float().softmax(-1) @ self._scale(outputs)

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """:func:`rating_metrics` of the mean scores; for histograms also the mean EMD."""
        labels = labels.float()
        if self.levels is None:
            return rating_metrics(self.predict(outputs), labels.reshape(-1), (self.low + self.high) / 2)
        shares = self._shares(labels)
        found = rating_metrics(self.predict(outputs), shares @ self._scale(shares), (self.low + self.high) / 2)
        return found | {"emd": float(emd(outputs.float().softmax(-1), shares, self.power).mean())}

    def _scale(self, like: Tensor) -> Tensor:
        return torch.linspace(self.low, self.high, int(self.levels or 1), device=like.device)

    def _shares(self, labels: Tensor) -> Tensor:
        total = labels.sum(-1, keepdim=True) if labels.ndim == 2 else None
        if total is None or labels.shape[1] != self.levels or bool((labels < 0).any()) or not bool(total.all()):
            raise BadInput(
                f"Labels of shape {tuple(labels.shape)} must be (B, {self.levels}) counts or shares of ratings, "
                "non-negative and not all zero."
            )
        return labels / total


def emd(predicted: Tensor, target: Tensor, power: float = 2.0) -> Tensor:
    """Earth mover's distance of distributions over ordered levels: ``((1/K) Σ_k |F̂_k − F_k|^r)^{1/r}``.

    >>> emd(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), power=1)
    tensor([0.5000])

    Args:
        predicted, target: (B, K), rows sum to 1.
        power: r.

    Returns: (B,).
    """
    gap = (predicted - target).cumsum(-1).abs()
    # equal distributions would give the root of 0, whose slope is infinite
    return gap.pow(power).mean(-1).clamp(min=1e-12).pow(1 / power)


def rating_metrics(predicted: Tensor, target: Tensor, middle: float) -> dict[str, float]:
    """Agreement of scores (N,) with ratings (N,).

    Args:
        predicted, target: (N,).
        middle: the score from which an image counts as good.

    Returns: ``plcc`` and ``srcc`` (Pearson's and Spearman's correlation; NaN if one side is constant), ``accuracy``
        of good against not good, ``mse``, ``mae``.
    """
    predicted, target = predicted.double(), target.double()
    a, b = predicted.detach().cpu().numpy(), target.cpu().numpy()
    constant = len(target) < 2 or float(predicted.std()) == 0 or float(target.std()) == 0
    return {
        "plcc": float("nan") if constant else float(pearsonr(a, b)[0]),
        "srcc": float("nan") if constant else float(spearmanr(a, b)[0]),
        "accuracy": float(((predicted >= middle) == (target >= middle)).double().mean()),
        "mse": float((predicted - target).square().mean()),
        "mae": float((predicted - target).abs().mean()),
    }


class RatingReadout(nn.Module):
    """Logits from the class token and the mean of the patches: ``W·dropout([CLS; mean]) + b`` after a layer norm.

    Without a class token the mean alone. Padding is left out of the mean, merged tokens count for all they hold.

    Args:
        dim: D.
        num_outputs: 1, or the number of rating levels.
        class_token: whether the host has one.
        drop: dropout probability.

    Shape: the host's states → (B, num_outputs).
    Raises: BadInput in forward if a class token is expected and the host has only other prefix tokens.
    Paper: Charm: The Missing Piece in ViT fine-tuning for Image Aesthetic Assessment, arXiv:2504.02522.
    Departs from the paper: nothing.
    """

    slot = "readout"
    preserves = "none"

    def __init__(self, dim: int, num_outputs: int, class_token: bool = True, drop: float = 0.1) -> None:
        super().__init__()
        self.class_token = class_token
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(2 * dim if class_token else dim, num_outputs)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        class_token: bool | None = None,
        drop: float = 0.1,
    ) -> RatingReadout:
        """A fresh head for the host's number of outputs; ``class_token=None``: as the host has prefix tokens or not."""
        return cls(spec.dim, spec.num_classes, spec.num_prefix > 0 if class_token is None else class_token, drop)

    def forward(self, states: Sequence[tuple[Tensor, TokenLayout]], layout: TokenLayout) -> Tensor:
        x, layout = states[-1]
        x = self.norm(x)
        patches = x[:, layout.num_prefix :]
        weight = torch.ones_like(patches[..., 0]) if layout.sizes is None else layout.sizes.to(x.dtype)
        if layout.valid is not None:
            weight = weight * layout.valid
        weight = weight.unsqueeze(-1)
        pooled = (patches * weight).sum(1) / weight.sum(1).clamp(min=1e-6)
        if self.class_token:
            if "class" not in dict(layout.prefix):
                raise BadInput("RatingReadout reads a class token, and this host has none; pass class_token=False.")
            pooled = torch.cat([x[:, layout.prefix_slice("class").start], pooled], dim=-1)
        return self.head(self.drop(pooled))


@dataclass(frozen=True, kw_only=True)
class RatedImages:
    """Rated images, read one at a time in their own size.

    Attributes: paths of the N files; scores (N,) float32, means where histograms are given; histograms (N, K) float32
    shares, or None; task to train with; absent: rows whose image file does not exist.
    """

    paths: tuple[Path, ...]
    scores: Tensor
    histograms: Tensor | None
    task: Aesthetics
    absent: tuple[str, ...] = ()

    @property
    def labels(self) -> Tensor:
        """What ``task.loss`` wants: histograms where there are any, else scores."""
        return self.scores if self.histograms is None else self.histograms

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (3, H, W) float32 in [0, 1] in its own size, and its label."""
        with Image.open(self.paths[index]) as file:
            pixels = np.array(ImageOps.exif_transpose(file).convert("RGB"))
        return torch.from_numpy(pixels).movedim(-1, 0).float() / 255, self.labels[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[i] for i in range(len(self)))


def aesthetics(
    table: str | PathLike[str],
    images: str | PathLike[str],
    image: str | None = None,
    score: str | None = None,
    histogram: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> RatedImages:
    """Read a table of rated images: file name, and a mean score or one count per rating level.

    Fits the tables of AADB, TAD66K, BAID, SPAQ and KonIQ-10k (scores) and of AVA and PARA (histograms) once they have a
    header line. File names may lack their suffix.

    Args:
        table: CSV file with a header, separated by comma, semicolon or tab.
        images: folder of the image files.
        image: column of the file names; None: image, image_name, image_id, path, file, name …
        score: column of the mean score; None: score, mos, mean …
        histogram: columns of the counts, from the lowest level; None: columns whose names end in 1, 2, … K after the
            same word (``rating_1``, ``vote1`` or plain numbers), if there are at least three.
        low, high: ends of the rating scale. None: 1 and K for histograms, for scores the extremes of the table.

    Raises: BadInput for an empty table, columns that are not there, values that are not numbers, or no image at all.
    """
    path, folder = Path(table), Path(images)
    rows = _rows(path)
    columns = {c.lower(): c for c in rows[0]}
    name = _column(image, _IMAGE_NAMES, columns, path, "image")
    bins = [_column(c, (), columns, path, "histogram") for c in histogram] if histogram else []
    if not bins and score is None:
        bins = _levels(list(rows[0]))
    used = bins or [_column(score, _SCORE_NAMES, columns, path, "score")]
    files = [_find(folder, str(row[name])) for row in rows]
    kept = [i for i, f in enumerate(files) if f is not None]
    if not kept:
        raise BadInput(f"None of the {len(rows)} images named by {path} is in {folder}, for example {rows[0][name]!r}.")
    numbers = torch.tensor([[_number(rows[i][c], c, path, i + 2) for c in used] for i in kept])
    found = tuple(f for f in files if f is not None)
    absent = tuple(str(row[name]) for row, f in zip(rows, files) if f is None)
    if not bins:
        scores = numbers[:, 0]
        task = Aesthetics(float(scores.min()) if low is None else low, float(scores.max()) if high is None else high)
        return RatedImages(paths=found, scores=scores, histograms=None, task=task, absent=absent)
    task = Aesthetics(1 if low is None else low, len(bins) if high is None else high, levels=len(bins))
    shares = task._shares(numbers)
    return RatedImages(paths=found, scores=shares @ task._scale(shares), histograms=shares, task=task, absent=absent)


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as UTF-8 text: {error}.") from error
    first = text.split("\n", 1)[0]
    rows = list(csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=first.count)))
    if not rows:
        raise BadInput(f"{path} has no rows below its header.")
    return rows


def _column(given: str | None, usual: Sequence[str], columns: Mapping[str, str], path: Path, what: str) -> str:
    names = (given,) if given is not None else usual
    found = next((columns[n.lower()] for n in names if n.lower() in columns), None)
    if found is None:
        asked = f"the column {given!r}" if given is not None else f"a column for the {what} ({', '.join(usual)})"
        raise BadInput(f"{path} has not got {asked}; it has {', '.join(columns.values())}. Name it with {what}=….")
    return found


def _levels(header: list[str]) -> list[str]:
    """Columns ``word1 … wordK`` (or plain 1 … K) in order, if K ≥ 3; else none."""
    words: dict[str, dict[int, str]] = {}
    for column in header:
        word = column.rstrip("0123456789")
        if word != column:
            words.setdefault(word, {})[int(column[len(word) :])] = column
    for numbered in words.values():
        count = next(k for k in range(len(numbered) + 1) if k + 1 not in numbered)
        if count >= 3:
            return [numbered[k + 1] for k in range(count)]
    return []


def _find(folder: Path, name: str) -> Path | None:
    return next((p for s in _SUFFIXES if (p := folder / f"{name.strip()}{s}").is_file()), None)


def _number(value: str | None, column: str, path: Path, line: int) -> float:
    try:
        number = float(value or "")
    except ValueError:
        number = float("nan")
    if number != number or abs(number) == float("inf"):
        raise BadInput(f"{path} line {line}: {column} is {value!r}, not a finite number.")
    return number
