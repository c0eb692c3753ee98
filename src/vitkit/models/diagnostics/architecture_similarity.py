"""How alike two architectures are, by aligning their layers like sequences; and a choice of models that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from vitkit.errors import BadInput

_FAMILIES: tuple[tuple[type[nn.Module], str], ...] = (
    (_ConvNd, "Conv"),
    (_BatchNorm, "BatchNorm"),
    (nn.LayerNorm, "LayerNorm"),
    (nn.GroupNorm, "GroupNorm"),
    (nn.MultiheadAttention, "Attention"),
    (nn.Linear, "Linear"),
)
_SILENT = ("Identity", "Dropout", "DropPath", "PatchDropout")


def layer_tokens(model: nn.Module) -> list[str]:
    """The layers of a model as words, in the order in which they were built.

    Convolutions, norms, linear layers and attention have one word each, whatever their size; other layers are called
    by their class. An attention module is one word, its projections are not listed. Layers that do nothing in
    evaluation (dropout, identity) are left out.

    >>> layer_tokens(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1)))
    ['Conv', 'BatchNorm', 'ReLU']
    """
    word = _word(model)
    own = [] if word is None else [word]
    if word == "Attention":
        return own
    return own + [token for child in model.children() for token in layer_tokens(child)]


def architecture_similarity(
    first: nn.Module | Sequence[str],
    second: nn.Module | Sequence[str],
    match: float = 1.0,
    mismatch: float = -1.0,
    gap: float = -1.0,
    borders: str = "zero",
) -> float:
    """Share of layers that pair up when two architectures are aligned, in [0, 1].

    Needleman–Wunsch on :func:`layer_tokens`: ``S_ij = max(S_{i−1,j−1} + s(a_i, b_j), S_{i−1,j} + g, S_{i,j−1} + g)``
    with s = ``match`` or ``mismatch`` and g = ``gap``; the index is equal pairs / length of the best alignment. Of
    several best alignments the one with the most equal pairs and then the shortest counts, so the index is symmetric;
    it is 1 for a model and itself.

    >>> a, b = ["Conv", "ReLU", "Linear"], ["Conv", "BatchNorm", "ReLU", "Linear"]
    >>> architecture_similarity(a, b)
    0.75

    Args:
        first: a model, or words as :func:`layer_tokens` gives them.
        second: likewise.
        match: score of two equal words; larger than ``mismatch``.
        mismatch: score of two different words set against each other.
        gap: score of a word set against nothing, not positive.
        borders: "zero" (the paper: gaps before the first pair cost nothing) or "linear" (they cost ``gap`` each).

    Raises: ValueError if a model has no layers, for unknown borders, or scores that do not reward matches.

    Paper: NeuRN: Neuro-inspired Domain Generalization for Image Classification, arXiv:2505.06881.

    Departs from the paper: the tie-break, "linear" borders, and which layers are words.
    """
    if borders not in ("zero", "linear"):
        raise BadInput(f"borders={borders!r} is not known; use 'zero' or 'linear'.")
    if not (match > 0 and match > mismatch and gap <= 0):
        raise BadInput(
            f"match={match}, mismatch={mismatch}, gap={gap} would not reward equal layers; match must be positive and "
            "above mismatch, and gap at most 0, such as 1, −1, −1."
        )
    a, b = _words(first), _words(second)
    edge = gap if borders == "linear" else 0.0
    # an entry is (score, equal pairs, −length); tuples compare in that order, and sums keep the order
    above = [(edge * j, 0, -j) for j in range(len(b) + 1)]
    for i, word in enumerate(a, 1):
        row = [(edge * i, 0, -i)]
        for j, other in enumerate(b, 1):
            same = word == other
            row.append(
                max(
                    _plus(above[j - 1], match if same else mismatch, int(same)),
                    _plus(above[j], gap, 0),
                    _plus(row[-1], gap, 0),
                )
            )
        above = row
    _, pairs, length = above[-1]
    return pairs / -length


def select_diverse(models: Mapping[str, nn.Module | Sequence[str]], num: int) -> list[str]:
    """Names of ``num`` models that differ: one of each cluster of similar architectures.

    Average-linkage clusters on 1 − :func:`architecture_similarity`; of each cluster the model most like the others in
    it, the first of equals, in the order given.

    >>> select_diverse({"a": ["Conv", "ReLU"], "b": ["Conv", "ReLU", "ReLU"], "c": ["Attention", "Linear"]}, 2)
    ['a', 'c']

    Args:
        models: models or words by name.
        num: how many to choose, from 1 to the number of models; fewer come back when architectures coincide.

    Raises: ValueError if ``num`` is out of range.
    """
    names = list(models)
    if not 1 <= num <= len(names):
        raise BadInput(f"num={num} of {len(names)} models cannot be chosen; use 1 to {len(names)}.")
    if len(names) == 1:
        return names
    words = [_words(models[name]) for name in names]
    similar = np.eye(len(names))
    for i in range(len(names)):
        for j in range(i):
            similar[i, j] = similar[j, i] = architecture_similarity(words[i], words[j])
    groups = fcluster(linkage(squareform(1 - similar), "average"), num, "maxclust")
    chosen = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        chosen.append(members[similar[np.ix_(members, members)].sum(1).argmax()])
    return [names[i] for i in sorted(chosen)]


def _word(module: nn.Module) -> str | None:
    for family, word in _FAMILIES:
        if isinstance(module, family):
            return word
    name = type(module).__name__
    # attention of every library keeps its projections inside; as one word it is told from an MLP
    if "Attention" in name and any(hasattr(module, n) for n in ("qkv", "query", "q_proj")):
        return "Attention"
    if any(True for _ in module.children()) or name.startswith(_SILENT):
        return None
    return name


def _words(model: nn.Module | Sequence[str]) -> list[str]:
    words = layer_tokens(model) if isinstance(model, nn.Module) else list(model)
    if not words:
        raise BadInput(f"{type(model).__name__} has no layers to align; give a model with at least one.")
    return words


def _plus(entry: tuple[float, int, int], score: float, pairs: int) -> tuple[float, int, int]:
    return entry[0] + score, entry[1] + pairs, entry[2] - 1
