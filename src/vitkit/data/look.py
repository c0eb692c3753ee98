"""One look at every image before anything is trained: can it be read, how large is it, what does it resemble?"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vitkit.data.decode import Unreadable, quiet
from vitkit.errors import VitkitError
from vitkit.files import atomic_write

Progress = Callable[[str, int, int], None]

_SIDE, _THUMB = 32, 16
_CHUNK = 512


@dataclass(frozen=True)
class Looks:
    """What was seen, one row an image.

    Attributes:
        sizes: (N, 2) height and width of the full images, int32.
        chans: (N,) channels.
        kinds: (N,) 0: uint8, 1: uint16, 2: other numbers.
        low, high: (N,) smallest and largest pixel value; of a JPEG, of its reduced decode.
        digests: (N, 16) hash of the file's bytes (of the pixels, for arrays).
        hashes: (N,) perceptual hash, 64 bit.
        thumbs: (N, 16, 16) small grey picture, contrast spread over 0…255, that confirms what the hash suspects.
    """

    sizes: np.ndarray
    chans: np.ndarray
    kinds: np.ndarray
    low: np.ndarray
    high: np.ndarray
    digests: np.ndarray
    hashes: np.ndarray
    thumbs: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, rows: np.ndarray) -> Looks:
        return Looks(**{name: value[rows] for name, value in vars(self).items()})

    @property
    def constant(self) -> np.ndarray:
        """(N,) True where every pixel has the same value in every channel."""
        return self.low == self.high


Load = Callable[[int], tuple[np.ndarray, tuple[int, int], bytes]]


def look(
    count: int, load: Load, what: str, progress: Progress | None = None, threads: int | None = None
) -> tuple[Looks, dict[int, str]]:
    """Look at ``count`` images in parallel threads (decoders release Python's lock).

    Args:
        count: how many.
        load: position → (pixels (H, W, C), full (H, W), digest). Raises Unreadable or OSError.
        what: shown in the progress.
        progress: called as ``progress(what, done, count)``.
        threads: None: one per core.

    Returns: what was seen of the readable images, in order, and position → reason of the others.
    """
    bad: dict[int, str] = {}
    parts: list[Looks] = []

    def one(i: int) -> tuple[object, ...] | str:
        try:
            array, size, digest = load(i)
        except Unreadable as error:
            return str(error)
        except OSError as error:
            return f"it cannot be opened ({error.strerror or error})"
        return (*_summary(array), size, digest)

    with quiet(), ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for start in range(0, count, _CHUNK):
            rows = range(start, min(start + _CHUNK, count))
            results = list(pool.map(one, rows))
            bad |= {i: r for i, r in zip(rows, results) if isinstance(r, str)}
            good = [r for r in results if not isinstance(r, str)]
            if good:
                parts.append(_pack(good))
            if progress is not None:
                progress(what, rows.stop, count)
    return join(parts), bad


def _summary(array: np.ndarray) -> tuple[np.ndarray, int, int, float, float]:
    kind = {"uint8": 0, "uint16": 1}.get(array.dtype.name, 2)
    # per channel: a plain red picture is as constant as a grey one
    low, high = float(array.min()), float(array.max())
    flat = bool((array == array[:1, :1]).all())
    grey = array.mean(-1, dtype=np.float32) if array.shape[2] != 1 else array[..., 0].astype(np.float32)
    small = np.asarray(Image.fromarray(grey).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
    return small, array.shape[2], kind, low, low if flat else high


def _pack(rows: Sequence[tuple[object, ...]]) -> Looks:
    small, chans, kinds, low, high, sizes, digests = zip(*rows)
    pictures = np.stack(small)  # type: ignore[arg-type]
    return Looks(
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        chans=np.array(chans, np.int32),
        kinds=np.array(kinds, np.uint8),
        low=np.array(low, np.float64),
        high=np.array(high, np.float64),
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),  # type: ignore[arg-type]
        hashes=perceptual_hash(pictures),
        thumbs=_thumbs(pictures),
    )


def join(parts: Sequence[Looks]) -> Looks:
    """Looks one after the other."""
    if not parts:
        parts = [_pack_nothing()]
    return Looks(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in vars(parts[0])})


def _pack_nothing() -> Looks:
    f, i = np.empty(0), np.empty(0, np.int32)
    digests, thumbs = np.empty((0, 16), np.uint8), np.empty((0, _THUMB, _THUMB), np.uint8)
    return Looks(i.reshape(0, 2), i, i.astype(np.uint8), f, f, digests, f.astype(np.uint64), thumbs)


def perceptual_hash(pictures: np.ndarray) -> np.ndarray:
    """64-bit DCT hash: which of the 8×8 lowest frequencies of a 32×32 grey picture exceed their median.

    ``bit_uv = [X_uv > median(X)]`` with ``X = C x Cᵀ`` and C the first 8 rows of the DCT-II. It hardly changes under
    scaling, recompression and small changes of brightness or contrast.

    Args:
        pictures: (N, 32, 32) float.

    Returns: (N,) uint64.
    """
    n = np.arange(_SIDE)
    cosines = np.cos(np.pi * (n[None] + 0.5) * np.arange(8)[:, None] / _SIDE).astype(np.float64)
    spectrum = (cosines @ pictures.astype(np.float64) @ cosines.T).reshape(-1, 64)
    # the constant term is brightness: it says nothing and would pull at the median of a flat picture
    spectrum[:, 0] = 0
    bits = spectrum > np.median(spectrum, 1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def _thumbs(pictures: np.ndarray) -> np.ndarray:
    small = pictures.reshape(-1, _THUMB, 2, _THUMB, 2).mean((2, 4))
    low, high = small.min((1, 2), keepdims=True), small.max((1, 2), keepdims=True)
    return np.rint((small - low) / np.maximum(high - low, 1e-12) * 255).astype(np.uint8)


def digest(data: bytes | memoryview) -> bytes:
    """16 bytes that differ when the content does."""
    return hashlib.blake2b(data, digest_size=16).digest()


def hash_lines(lines: Iterable[str]) -> str:
    """One short hexadecimal fingerprint of many lines."""
    h = hashlib.blake2b(digest_size=16)
    for line in lines:
        h.update(line.encode("utf-8", "surrogatepass"))
        h.update(b"\n")
    return h.hexdigest()


def remember(path: Path, fingerprint: str, looks: Looks, bad: dict[int, str]) -> None:
    """Write what was seen, so that the next process need not look again."""
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            fingerprint=np.array(fingerprint),
            bad=np.array(list(bad), np.int64),
            reasons=np.array(list(bad.values()), dtype=np.str_),
            **vars(looks),
        )


def recall(path: Path, fingerprint: str) -> tuple[Looks, dict[int, str]] | None:
    """What :func:`remember` wrote about the same listing; None if there is nothing or it is about another one."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["fingerprint"]) != fingerprint:
                return None
            bad = dict(zip(kept["bad"].tolist(), kept["reasons"].tolist()))
            return Looks(**{name: kept[name] for name in Looks.__dataclass_fields__}), bad
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise VitkitError(f"{path} is damaged ({error}); delete it, it is only a memory of checks.") from error
