"""Events of a neuromorphic camera as maps that a network takes: voxels of counts, window after window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitkit.errors import BadInput

#: the usual window of the field, microseconds
WINDOW_US = 50_000


@dataclass(frozen=True)
class Events:
    """A stream of events, each a change of brightness at a pixel.

    Attributes:
        x, y: (N,) column and row of the pixel, whole numbers.
        t: (N,) time in microseconds, in any order.
        p: (N,) polarity: 1 brighter; 0 or −1 darker.

    Raises: BadInput if the four differ in length.
    """

    x: np.ndarray
    y: np.ndarray
    t: np.ndarray
    p: np.ndarray

    def __post_init__(self) -> None:
        shapes = {name: np.shape(getattr(self, name)) for name in ("x", "y", "t", "p")}
        if len(set(shapes.values())) != 1 or len(shapes["x"]) != 1:
            listed = ", ".join(f"{n} {s}" for n, s in shapes.items())
            raise BadInput(f"Events need x, y, t and p as four lists of equal length, not {listed}.")

    def __len__(self) -> int:
        return len(self.x)


def voxel(
    events: Events,
    size: tuple[int, int],
    bins: int = 10,
    clip: int = 10,
    start: float | None = None,
    duration: float = WINDOW_US,
) -> Tensor:
    """Counts of the events in one window of time, by polarity, time bin and pixel.

    >>> import numpy as np
    >>> events = Events(x=np.array([1, 1]), y=np.array([0, 0]), t=np.array([0, 49_999]), p=np.array([1, 0]))
    >>> grid = voxel(events, size=(2, 3), bins=2)
    >>> grid.shape, grid.nonzero().tolist()
    (torch.Size([4, 2, 3]), [[1, 0, 1], [2, 0, 1]])

    Args:
        events: of any length; those outside the window are left out.
        size: (H, W) of the camera.
        bins: T_b, equal parts of the window.
        clip: largest count of a cell.
        start: of the window, microseconds; None: the time of the first event.
        duration: of the window, microseconds; 50 ms.

    Returns: (2·T_b, H, W) float32, channels ``polarity·T_b + bin`` with the darker events first.

    Raises: BadInput for events outside the camera, polarities other than −1, 0, 1, or sizes below 1.
    """
    return voxel_windows(events, size, bins, clip, start, duration, windows=1)[0]


def voxel_windows(
    events: Events,
    size: tuple[int, int],
    bins: int = 10,
    clip: int = 10,
    start: float | None = None,
    duration: float = WINDOW_US,
    windows: int | None = None,
) -> Tensor:
    """Consecutive windows of a stream, each as :func:`voxel` has it.

    Args:
        windows: T; None: as many as reach the last event. The rest as in :func:`voxel`.

    Returns: (T, 2·T_b, H, W); ``.flatten(0, 1)`` gives an image for a network with ``windows=T``.

    Raises: as :func:`voxel`.
    """
    height, width = size
    if min(height, width, bins, clip) < 1 or duration <= 0 or (windows is not None and windows < 1):
        raise BadInput(
            f"voxels of size={height}×{width}, bins={bins}, clip={clip}, duration={duration}, windows={windows}: all "
            "must be at least 1."
        )
    x, y, polarity = (np.asarray(v).astype(np.int64) for v in (events.x, events.y, events.p))
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    if outside.any():
        at = int(outside.argmax())
        raise BadInput(
            f"{int(outside.sum())} of {len(events)} events lie outside {height} rows × {width} columns; the first is "
            f"at row {y[at]}, column {x[at]}. Give the camera's size as (rows, columns)."
        )
    if not np.isin(polarity, (-1, 0, 1)).all():
        raise BadInput(f"Polarities must be 1 (brighter) and 0 or −1 (darker), not {np.unique(polarity)[:5].tolist()}.")
    # relative to the start in float64, so that microseconds since 1970 keep their precision
    first = start if start is not None else (float(np.min(events.t)) if len(events) else 0.0)
    since = (np.asarray(events.t) - first).astype(np.float64)
    step = np.floor(since / duration * bins).astype(np.int64)
    if windows is None:
        windows = int(step.max(initial=0) // bins) + 1
    inside = (step >= 0) & (step < windows * bins)
    window, part = np.divmod(step[inside], bins)
    channel = (polarity[inside] > 0) * bins + part
    cell = ((window * 2 * bins + channel) * height + y[inside]) * width + x[inside]
    counts = np.bincount(cell, minlength=windows * 2 * bins * height * width)
    grid = np.minimum(counts, clip).astype(np.float32).reshape(windows, 2 * bins, height, width)
    return torch.from_numpy(grid)


def read_dat(path: str | Path) -> Events:
    """Events of a Prophesee ``.dat`` recording (GEN1 and its kin).

    The format is a header of lines that begin with ``%``, two bytes (type and size of a record), then records of eight
    bytes, little-endian: the time (32 bits), x (14 bits), y (14 bits) and the polarity (4 bits). ``.h5`` recordings
    have no common layout; read their arrays with h5py and make :class:`Events` of them.

    Raises: BadInput if the file is no such recording or cut off.
    """
    content = Path(path).read_bytes()
    at = 0
    while content[at : at + 1] == b"%":
        end = content.find(b"\n", at)
        if end < 0:
            raise BadInput(f"{path} ends within its header; copy the recording again.")
        at = end + 1
    if at == 0 or len(content) < at + 2:
        raise BadInput(f"{path} is not a .dat recording: it has no header of lines that begin with %.")
    record, body = content[at + 1], content[at + 2 :]
    if record != 8 or len(body) % 8:
        raise BadInput(
            f"{path} holds records of {record} bytes in {len(body)} bytes; a .dat recording of events has whole "
            "records of 8. Copy it again, or convert it."
        )
    raw = np.frombuffer(body, dtype=[("t", "<u4"), ("where", "<u4")])
    where = raw["where"].astype(np.int64)
    return Events(x=where & 0x3FFF, y=(where >> 14) & 0x3FFF, t=raw["t"].astype(np.int64), p=(where >> 28) & 1)


@dataclass(frozen=True)
class Step:
    """One batch of a recurrent training.

    Attributes:
        clips: (B, T, c, H, W).
        starts: (B,) bool; True where the memory must be zero before the clip.
        sequence: (B,) index of the sequence of each row. first: (B,) index of its first window.
    """

    clips: Tensor
    starts: Tensor
    sequence: Tensor
    first: Tensor


def mixed_batches(
    sequences: Sequence[Tensor], batch: int, windows: int, steps: int, streaming: float = 0.5, seed: int = 0
) -> Iterator[Step]:
    """Batches for truncated backpropagation through time: some rows follow a sequence, the others jump.

    A streaming row continues where it stood in the step before, so memory can be carried on; at the end of its sequence
    it takes up another one, with ``starts`` set. A random row is a clip from anywhere, always with ``starts`` set. What
    remains of a sequence after its last whole clip is not seen by streaming rows.

    Args:
        sequences: (L_i, c, H, W) each, at least ``windows`` long.
        batch: B. windows: T of a clip. steps: number of batches.
        streaming: share of the rows that stream, rounded. seed: of all draws.

    Raises: BadInput if there are no sequences, one is too short, or an option is out of range.
    """
    if not sequences or min(len(s) for s in sequences) < windows or min(batch, windows) < 1 or not 0 <= streaming <= 1:
        shortest = min((len(s) for s in sequences), default=0)
        raise BadInput(
            f"mixed_batches got {len(sequences)} sequences, the shortest of {shortest} windows, batch={batch}, "
            f"windows={windows}, streaming={streaming}; it needs sequences of at least `windows` windows, a batch of "
            "at least 1 and a share in [0, 1]."
        )
    rng = np.random.default_rng(seed)
    num_streaming = round(streaming * batch)
    sequence = rng.integers(len(sequences), size=batch)
    first = np.zeros(batch, dtype=np.int64)
    starts = np.ones(batch, dtype=bool)
    for _ in range(steps):
        for row in range(num_streaming, batch):
            sequence[row] = rng.integers(len(sequences))
            first[row] = rng.integers(len(sequences[sequence[row]]) - windows + 1)
        clips = torch.stack([sequences[s][f : f + windows] for s, f in zip(sequence, first)])
        yield Step(clips, *(torch.from_numpy(v.copy()) for v in (starts, sequence, first)))
        first[:num_streaming] += windows
        starts = np.ones(batch, dtype=bool)
        for row in range(num_streaming):
            starts[row] = first[row] + windows > len(sequences[sequence[row]])
            if starts[row]:
                sequence[row], first[row] = rng.integers(len(sequences)), 0
