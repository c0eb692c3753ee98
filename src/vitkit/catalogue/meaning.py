"""Search by meaning: a sentence encoder's vectors of papers, made once and kept beside other caches.

Words find what is called by the words of the query; vectors also find what says the same in others. Both orders are
joined by reciprocal ranks (Cormack, Clarke & Büttcher 2009), which needs no common scale.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import WARNING, disable, root
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vitkit.errors import BadInput, MissingExtra
from vitkit.files import atomic_write

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
#: how little the difference between first and second counts; the value of the method's authors
RANK_OFFSET = 60
_HASH_BYTES = 16
_CHUNK = 256

Key = TypeVar("Key", bound=Hashable)


def vectors_path() -> Path:
    """``papers.safetensors`` in ``$VITKIT_CACHE``, else in ``~/.cache/vitkit``."""
    return Path(os.environ.get("VITKIT_CACHE", Path.home() / ".cache" / "vitkit")) / "papers.safetensors"


class Vectors:
    """Vectors of texts under one encoder; what is there already is not computed again.

    Args:
        model: a name on the Hugging Face hub or a folder, of a model that ``sentence-transformers`` loads from
            safetensors; None: the one that the vectors on file were made with.
        path: the file; :func:`vectors_path` if not given.

    Raises: BadInput if no model is given and there are no vectors on file.
    """

    def __init__(self, model: str | None = None, path: Path | None = None) -> None:
        self.path = path or vectors_path()
        made_with, self._known = _read(self.path)
        if model is None and made_with is None:
            raise BadInput("There are no vectors of papers yet: `vitkit papers embed` makes them.")
        self.model = model or made_with or DEFAULT_MODEL
        if self.model != made_with:
            self._known = {}
        self._encoder: Any = None

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Those of the texts that have no vector yet."""
        return list(dict.fromkeys(text for text in texts if _hash(text) not in self._known))

    def add(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> int:
        """Compute and keep the vectors that are missing; the file is written after every 256.

        Args:
            progress: called with the number done and of all that were missing.

        Returns: how many were missing.
        Raises: MissingExtra without ``sentence-transformers``; BadInput if the model cannot be loaded.
        """
        todo = self.missing(texts)
        for start in range(0, len(todo), _CHUNK):
            part = todo[start : start + _CHUNK]
            self._known |= dict(zip(map(_hash, part), self._encode(part)))
            self._write()
            if progress:
                progress(min(start + _CHUNK, len(todo)), len(todo))
        return len(todo)

    def rank(self, query: str, texts: Mapping[Key, str], limit: int) -> list[tuple[Key, float]]:
        """The texts nearest to the query with their cosines, the nearest first; vectors that are missing are made.

        Raises: as for :meth:`add`.
        """
        if not texts or not query.strip():
            return []
        keys = list(texts)
        self.add(list(texts.values()))
        matrix = np.stack([self._known[_hash(texts[key])] for key in keys])
        cosine = matrix @ self._encode([query])[0]
        order = np.argsort(-cosine, kind="stable")[:limit]
        return [(keys[i], float(cosine[i])) for i in order]

    def _encode(self, texts: list[str]) -> np.ndarray:
        if self._encoder is None:
            self._encoder = _load(self.model)
        found = self._encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(found, dtype=np.float32)

    def _write(self) -> None:
        from safetensors.numpy import save_file

        hashes = np.frombuffer(b"".join(self._known), dtype=np.uint8).reshape(-1, _HASH_BYTES)
        tensors = {"hashes": hashes, "vectors": np.stack(list(self._known.values()))}
        with atomic_write(self.path) as temporary:
            save_file(tensors, temporary, {"model": json.dumps(self.model)})


def have_vectors() -> bool:
    """Whether there are vectors on file, so that a search can use them."""
    return vectors_path().is_file()


def fuse(*orders: Sequence[Key]) -> list[Key]:
    """One order out of several: a thing scores 1 / (60 + its place) in each order that has it.

    >>> fuse(["a", "b", "c"], ["c", "a", "d"])
    ['a', 'c', 'b', 'd']
    """
    score: dict[Key, float] = {}
    for order in orders:
        for place, key in enumerate(order, 1):
            score[key] = score.get(key, 0.0) + 1 / (RANK_OFFSET + place)
    return sorted(score, key=lambda key: -score[key])


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[:_HASH_BYTES]


def _read(path: Path) -> tuple[str | None, dict[bytes, np.ndarray]]:
    """Model and vectors of a file; a cache that cannot be read is made anew."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None, {}
    try:
        with safe_open(path, "numpy") as file:
            model = json.loads((file.metadata() or {})["model"])
            hashes, vectors = file.get_tensor("hashes"), file.get_tensor("vectors")
        return str(model), dict(zip((row.tobytes() for row in hashes), vectors))
    except (SafetensorError, OSError, KeyError, ValueError):
        return None, {}


def _load(model: str) -> Any:
    with _silent():
        try:
            from sentence_transformers import SentenceTransformer
            from transformers.utils import logging
        except ImportError as error:
            raise MissingExtra("Search by meaning", "sentence-transformers", "embeddings") from error
        logging.disable_progress_bar()
        try:
            return SentenceTransformer(model, device="cpu", model_kwargs={"use_safetensors": True})
        except Exception as error:
            # the hub, the file system and the model's own code each have their errors
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadInput(
                f"The sentence encoder {model!r} cannot be loaded: {reason} Give --model a folder that holds one."
            ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Loading warns of what nobody here can change; failures are raised all the same."""
    before = root.manager.disable
    disable(WARNING)
    try:
        yield
    finally:
        disable(before)
