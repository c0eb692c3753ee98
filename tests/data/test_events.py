"""Events to voxels: every count against a loop, windows, clipping, recordings, batches for training through time."""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np
import pytest
import torch

from vitkit.data.events import Events, mixed_batches, read_dat, voxel, voxel_windows
from vitkit.errors import BadInput


def stream(num=400, height=5, width=7, total=200_000, seed=0):
    rng = np.random.default_rng(seed)
    return Events(
        x=rng.integers(width, size=num),
        y=rng.integers(height, size=num),
        t=rng.integers(total, size=num),
        p=rng.integers(2, size=num),
    )


def test_counts_are_those_of_a_loop():
    events, bins, duration = stream(2000), 4, 50_000
    grid = voxel_windows(events, (5, 7), bins=bins, clip=3, start=0, duration=duration)
    expected = torch.zeros(4, 2 * bins, 5, 7)
    for x, y, t, p in zip(events.x, events.y, events.t, events.p):
        window, part = t // duration, t % duration * bins // duration
        expected[window, p * bins + part, y, x] += 1
    assert expected.max() > 3
    assert torch.equal(grid, expected.clamp(max=3)) and grid.dtype == torch.float32


def test_one_window_leaves_out_what_is_outside():
    events = stream()
    grid = voxel(events, (5, 7), bins=2, clip=100, start=50_000)
    inside = (events.t >= 50_000) & (events.t < 100_000)
    assert grid.shape == (4, 5, 7) and int(grid.sum()) == int(inside.sum())
    assert torch.equal(grid, voxel_windows(events, (5, 7), bins=2, clip=100, start=0)[1])


def test_polarities_may_be_signed_and_times_absolute():
    events = stream()
    # microseconds since 1970 do not fit into 32 bits nor, with their fractions of a bin, into float32
    later = Events(x=events.x, y=events.y, t=events.t + 1_700_000_000_000_000, p=2 * events.p - 1)
    assert torch.equal(voxel_windows(later, (5, 7)), voxel_windows(events, (5, 7)))


def test_no_events_are_an_empty_map():
    none = Events(*(np.zeros(0, dtype=int) for _ in range(4)))
    assert voxel(none, (3, 4), bins=2).shape == (4, 3, 4) and voxel(none, (3, 4)).sum() == 0


def test_errors_name_the_event():
    with pytest.raises(BadInput, match=r"row 4, column 9"):
        voxel(Events(x=np.array([1, 9]), y=np.array([0, 4]), t=np.array([0, 1]), p=np.array([0, 1])), (5, 7))
    with pytest.raises(BadInput, match=r"\[3\]"):
        voxel(Events(x=np.array([1]), y=np.array([0]), t=np.array([0]), p=np.array([3])), (5, 7))
    with pytest.raises(BadInput, match="equal length"):
        Events(x=np.zeros(2), y=np.zeros(3), t=np.zeros(2), p=np.zeros(2))
    with pytest.raises(BadInput, match="bins=0"):
        voxel(stream(), (5, 7), bins=0)


def test_a_recording_is_read_bit_by_bit(tmp_path):
    rows = [(0, 303, 239, 1), (1234, 0, 7, 0), (4_000_000_000, 16383, 16383, 1)]
    body = b"".join(struct.pack("<II", t, x | y << 14 | p << 28) for t, x, y, p in rows)
    path = tmp_path / "one.dat"
    path.write_bytes(b"% Data file\n% Height 240\n" + bytes([0, 8]) + body)
    events = read_dat(path)
    assert list(zip(events.t.tolist(), events.x.tolist(), events.y.tolist(), events.p.tolist())) == rows
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BadInput, match=r"one\.dat"):
        read_dat(path)
    path.write_bytes(b"PNG")
    with pytest.raises(BadInput, match="no header"):
        read_dat(path)


def test_streaming_rows_go_on_and_random_rows_start_anew():
    # the value of a window says which sequence and which place it is
    sequences = [100 * i + torch.arange(n).float().view(-1, 1, 1, 1) for i, n in enumerate((7, 5, 9))]
    steps = list(mixed_batches(sequences, batch=4, windows=2, steps=12, streaming=0.5))
    assert len(steps) == 12 and steps[0].clips.shape == (4, 2, 1, 1, 1) and steps[0].starts.all()
    for step in steps:
        expected = 100 * step.sequence + step.first
        assert torch.equal(step.clips[:, 0, 0, 0, 0], expected.float())
        assert torch.equal(step.clips[:, 1, 0, 0, 0], expected.float() + 1)
        assert step.starts[2:].all()
    resumed = 0
    for before, after in pairwise(steps):
        for row in range(2):
            if after.starts[row]:
                assert after.first[row] == 0
                assert before.first[row] + 4 > len(sequences[before.sequence[row]])
            else:
                resumed += 1
                assert after.sequence[row] == before.sequence[row] and after.first[row] == before.first[row] + 2
    assert resumed > 5
    again = list(mixed_batches(sequences, batch=4, windows=2, steps=12))
    assert all(torch.equal(a.clips, b.clips) for a, b in zip(steps, again))
    with pytest.raises(BadInput, match="shortest of 5"):
        next(mixed_batches(sequences, batch=4, windows=6, steps=1))
