from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitkit.data import augment
from vitkit.data.augment import AUGMENTATIONS, change_values, crop_boxes, draws, move_pixels, randaugment, resolve
from vitkit.errors import BadInput, UnknownName


def test_draws_are_uniform_and_independent():
    u = draws(3, 5, np.arange(20_000))
    assert u.shape == (20_000, 24) and u.min() >= 0 and u.max() < 1
    np.testing.assert_allclose(u.mean(0), 0.5, atol=0.015)
    np.testing.assert_allclose(u.var(0), 1 / 12, atol=0.004)
    off = np.corrcoef(u.T) - np.eye(24)
    assert np.abs(off).max() < 0.04
    # neighbouring images, epochs and seeds have nothing in common
    for other in (draws(3, 6, np.arange(20_000)), draws(4, 5, np.arange(20_000)), draws(3, 5, np.arange(1, 20_001))):
        assert abs(np.corrcoef(u[:, 0], other[:, 0])[0, 1]) < 0.03


@given(
    seed=st.integers(0, 10**6), epoch=st.integers(0, 500), rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=9)
)
def test_draws_belong_to_the_image_not_to_the_batch(seed, epoch, rows):
    together = draws(seed, epoch, np.array(rows))
    for row, got in zip(rows, together):
        np.testing.assert_array_equal(draws(seed, epoch, np.array([row]))[0], got)


def test_crops_lie_inside_and_have_the_promised_area():
    boxes = crop_boxes(draws(0, 0, np.arange(5000)))
    left, top, w, h = boxes.T
    assert boxes.min() >= 0 and (left + w).max() <= 1 + 1e-9 and (top + h).max() <= 1 + 1e-9
    area = w * h
    assert area.min() >= 0.5 - 1e-9 and area.max() <= 1 + 1e-9 and area.mean() == pytest.approx(0.75, abs=0.01)
    assert (w / h).max() <= 4 / 3 + 1e-9 and (w / h).min() >= 3 / 4 - 1e-9


def reference_shift(image: np.ndarray, top: int, left: int, reach: int) -> np.ndarray:
    h, w, _ = image.shape
    out = np.empty_like(image)
    for y in range(h):
        for x in range(w):
            out[y, x] = image[min(max(y + top - reach, 0), h - 1), min(max(x + left - reach, 0), w - 1)]
    return out


def test_shift_is_the_plain_loop():
    images = np.random.default_rng(0).integers(0, 256, (6, 9, 17, 2), dtype=np.uint8)
    u = draws(0, 0, np.arange(6))
    reach = 1
    moved = move_pixels(images, u, ("shift",))
    top, left = (u[:, 4:6] * (2 * reach + 1)).astype(int).T
    for i in range(6):
        np.testing.assert_array_equal(moved[i], reference_shift(images[i], top[i], left[i], reach))
    assert len({tuple(p) for p in zip(top, left)}) > 2


@pytest.mark.parametrize("name", ["flip", "vflip", "rotate90"])
def test_moves_are_exact_and_leave_the_input_alone(name):
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    before = images.copy()
    moved = move_pixels(images, draws(0, 0, np.arange(64)), (name,))
    np.testing.assert_array_equal(images, before)
    allowed = {
        "flip": [images, images[:, :, ::-1]],
        "vflip": [images, images[:, ::-1]],
        "rotate90": [np.rot90(images, k, (1, 2)) for k in range(4)],
    }[name]
    matches = np.stack([(moved == a).all((1, 2, 3)) for a in allowed])
    assert matches.any(0).all()
    shares = matches.mean(1)
    assert shares.min() > 0.5 / len(allowed)


@given(chans=st.sampled_from([1, 3, 5]), h=st.integers(3, 20), w=st.integers(3, 20), seed=st.integers(0, 999))
def test_values_stay_in_range_and_finite(chans, h, w, seed):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.random((7, chans, h, w), dtype=np.float32))
    before = images.clone()
    out = change_values(images, draws(seed, 1, np.arange(7)), ("color", "randaugment", "erase"))
    assert torch.equal(images, before)
    assert out.shape == images.shape and out.dtype == torch.float32
    assert torch.isfinite(out).all() and out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("operation", range(13))
def test_every_operation_keeps_a_flat_picture_flat_or_unchanged_at_zero(operation):
    u = np.full((4, 4), 0.3)
    u[:, [0, 2]] = (operation + 0.5) / 13
    images = torch.rand(4, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    still = randaugment(images, u, magnitude=0)
    if operation not in (9, 11):  # posterising and stretching do something at any magnitude
        torch.testing.assert_close(still, images, atol=2e-5, rtol=0)
    changed = randaugment(images, u, magnitude=25)
    assert torch.equal(changed, images) == (operation == 12)
    flat = torch.full((4, 3, 12, 16), 0.4)
    assert float(randaugment(flat, u, magnitude=25).std()) < 0.06 or operation == 10


def test_rotation_turns_about_the_centre():
    picture = torch.zeros(1, 1, 21, 41)
    picture[0, 0, 10, 20] = 1
    moved = augment._affine(picture, torch.tensor([4]), torch.tensor([1.0]))
    assert moved[0, 0].argmax() == picture[0, 0].argmax()
    # 30 degrees: a point 8 to the right of the centre lands 8·cos30 to the right, 4 up or down, whatever the aspect
    picture = torch.zeros(1, 1, 21, 41)
    picture[0, 0, 10, 28] = 1
    moved = augment._affine(picture, torch.tensor([4]), torch.tensor([1.0]))[0, 0]
    y, x = divmod(int(moved.argmax()), 41)
    assert abs(abs(y - 10) - 4) <= 1 and abs(x - (20 + 6.93)) <= 1


def test_half_the_images_lose_a_rectangle():
    images = torch.rand(400, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    out = change_values(images, draws(0, 0, np.arange(400)), ("erase",))
    share = (out != images).float().mean((1, 2, 3))
    assert 0.4 < float((share > 0).float().mean()) < 0.6
    assert float(share[share > 0].min()) > 0.0 and float(share.max()) < 0.3


def test_names():
    assert resolve("none", (8, 8), True) == ()
    assert resolve("light", (32, 32), True) == ("shift", "flip")
    assert resolve("light", (8, 8), False) == ("shift",)
    assert resolve("strong", (224, 224), True) == ("crop", "flip", "randaugment")
    assert resolve(["erase", "crop"], (96, 96), True) == ("crop", "erase")
    with pytest.raises(UnknownName, match="Did you mean 'light'"):
        resolve("lite", (8, 8), True)
    with pytest.raises(UnknownName, match="randaugment"):
        resolve(["randaugmnt"], (8, 8), True)
    with pytest.raises(BadInput, match="square"):
        resolve(["rotate90"], (8, 9), True)
    assert set(augment._COLUMNS) == set(AUGMENTATIONS)
