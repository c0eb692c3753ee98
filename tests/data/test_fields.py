"""Pairs of fields from files: order, standardisation, fixed fields, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vitkit.data.fields import FieldPairs
from vitkit.errors import BadInput


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    low, high = tmp_path / "low", tmp_path / "high"
    low.mkdir()
    high.mkdir()
    for name, count in (("a", 3), ("b", 2)):
        t = 280 + 5 * rng.standard_normal((count, 1, 4, 6))
        rain = rng.random((count, 4, 6))
        np.savez(low / f"{name}.npz", t2m=t, rain=rain, orography=np.arange(24.0).reshape(4, 6))
        fine = np.repeat(np.repeat(t[:, 0], 2, 1), 2, 2)
        fine[:, 0, 0] = np.nan
        np.savez(high / f"{name}.npz", t2m=fine)
    return low, high


def load(folder, name):
    return np.concatenate([np.load(folder / f"{f}.npz")[name].reshape(-1, 4, 6) for f in "ab"])


def test_samples_in_order_standardised_and_batched(folders):
    pairs = FieldPairs(*folders, ["orography", "t2m"], ["t2m"])
    assert len(pairs) == 5 and pairs.scale == (2, 2)
    t = load(folders[0], "t2m")
    assert pairs.mean["t2m"] == pytest.approx(t.mean(), rel=1e-6)
    assert pairs.std["t2m"] == pytest.approx(t.std(), rel=1e-4)
    for index in (0, 2, 3, 4, -1):
        item = pairs[index]
        expected = (t[index] - t.mean()) / t.std()
        np.testing.assert_allclose(item["images"][1].numpy(), expected, atol=1e-4)
        np.testing.assert_allclose(item["labels"][0, 1::2, 1::2].numpy(), t[index], rtol=1e-6)
    orography = pairs[4]["images"][0]
    assert torch.equal(orography, pairs[0]["images"][0]) and float(orography.mean()) == pytest.approx(0, abs=1e-6)
    batch = next(iter(DataLoader(pairs, batch_size=4, shuffle=True)))
    assert batch["images"].shape == (4, 2, 4, 6) and batch["labels"].shape == (4, 1, 8, 12)
    with pytest.raises(IndexError, match="5 samples"):
        pairs[5]


def test_missing_cells_stay_missing_in_labels_and_are_the_mean_in_inputs(folders):
    low, high = folders
    pairs = FieldPairs(low, high, ["t2m"], ["t2m"])
    assert torch.isnan(pairs[0]["labels"][0, 0, 0]) and int(torch.isnan(pairs[0]["labels"]).sum()) == 1
    fine = np.concatenate([np.load(high / f"{f}.npz")["t2m"].ravel() for f in "ab"])
    assert pairs.target_mean == pytest.approx([np.nanmean(fine)]) and pairs.target_std == pytest.approx(
        [np.nanstd(fine)], rel=1e-4
    )
    with np.load(low / "a.npz") as archive:
        arrays = dict(archive)
    arrays["t2m"][0, 0, 1, 1] = np.nan
    np.savez(low / "a.npz", **arrays)
    assert float(FieldPairs(low, high, ["t2m"], ["t2m"])[0]["images"][0, 1, 1]) == 0


def test_stored_and_given_statistics_come_first(folders):
    low, high = folders
    np.savez(low / "normalize_mean.npz", t2m=np.array([270.0]))
    np.savez(low / "normalize_std.npz", t2m=np.array([2.0]))
    pairs = FieldPairs(low, high, ["t2m", "rain"], ["t2m"], std={"t2m": 4.0})
    assert pairs.mean["t2m"] == 270 and pairs.std["t2m"] == 4
    assert pairs.mean["rain"] == pytest.approx(load(low, "rain").mean())


def test_refusals_name_the_file(folders):
    low, high = folders
    with pytest.raises(BadInput, match="a.npz has no array 'wind'; it has t2m, rain, orography"):
        FieldPairs(low, high, ["wind"], ["t2m"])
    with pytest.raises(BadInput, match="whole multiples"):
        FieldPairs(high, low, ["t2m"], ["t2m"])
    np.savez(low / "c.npz", t2m=np.zeros((1, 4, 6)))
    with pytest.raises(BadInput, match=r"c\.npz is in one of them only"):
        FieldPairs(low, high, ["t2m"], ["t2m"])
    (high / "c.npz").write_bytes(b"no archive")
    with pytest.raises(BadInput, match="cannot be read"):
        FieldPairs(low, high, ["t2m"], ["t2m"])
    with pytest.raises(BadInput, match="is no folder"):
        FieldPairs(low / "x", high, ["t2m"], ["t2m"])
