from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitkit.data.decode import (
    Reading,
    Unreadable,
    decode,
    draft_size,
    fit_box,
    image_from_bytes,
    read_image,
    resample,
    to_channels,
    to_unit,
    value_range_of,
)
from vitkit.errors import BadInput


def save(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes, name: str = "a.png", **how) -> np.ndarray:
    return decode(data, name, Reading(**how))[0]


def test_grey_colour_and_one_bit_come_as_they_are():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(pixels(save(Image.fromarray(grey)))[..., 0], grey)
    colour = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(save(Image.fromarray(colour))), colour)
    bits = pixels(save(Image.fromarray(grey > 5)))
    assert set(bits.ravel().tolist()) == {0, 255} and bits.shape == (3, 4, 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_values(kind):
    values = np.array([[0, 1, 256], [4095, 32768, 65535]], np.uint16)
    got = pixels(save(Image.fromarray(values), kind), f"a.{kind}")
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got[..., 0], values)
    np.testing.assert_allclose(to_unit(got, (0, 1))[..., 0], values / 65535, rtol=1e-6)


def test_big_endian_16_bit_tiff():
    values = np.array([[1, 258], [4096, 65535]], np.uint16)
    data = save(Image.frombytes("I;16B", (2, 2), values.astype(">u2").tobytes()), "TIFF")
    assert data[:2] == b"MM"
    np.testing.assert_array_equal(pixels(data, "a.tif")[..., 0], values)


def test_float_tiff_and_its_nan():
    values = np.array([[0.25, -3.5], [7.0, 1e4]], np.float32)
    np.testing.assert_array_equal(pixels(save(Image.fromarray(values), "TIFF"))[..., 0], values)
    values[0, 0] = np.nan
    with pytest.raises(Unreadable, match="NaN"):
        pixels(save(Image.fromarray(values), "TIFF"))


def test_alpha_is_composited_on_white():
    rgba = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], np.uint8)
    data = save(Image.fromarray(rgba))
    # 51/255 = 0.2: 0.2·200 + 0.8·255 = 244, 0.2·100 + 204 = 224, 204
    assert pixels(data)[0].tolist() == [[200, 100, 0], [255, 255, 255], [244, 224, 204]]
    assert pixels(data, alpha="black")[0].tolist() == [[200, 100, 0], [0, 0, 0], [40, 20, 0]]
    assert pixels(data, alpha="drop")[0].tolist() == [[200, 100, 0]] * 3
    assert pixels(data, alpha="keep").shape == (1, 3, 4)


def test_grey_with_alpha_stays_grey():
    la = np.array([[[10, 255], [10, 0]]], np.uint8)
    assert pixels(save(Image.fromarray(la, "LA"))).tolist() == [[[10], [255]]]


def test_palette_with_and_without_transparency():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert pixels(save(image)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert pixels(save(image, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_cmyk_becomes_rgb():
    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[:, :8] = (0, 255, 255, 0)  # red ink
    cmyk[:, 8:] = (0, 0, 0, 255)  # black ink
    for data in (save(Image.fromarray(cmyk, "CMYK"), "TIFF"), save(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=98)):
        got = pixels(data).astype(int)
        assert np.abs(got[8, 3] - (255, 0, 0)).max() <= 6
        assert np.abs(got[8, 13]).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    # the marked corner of the upright picture is top-left; the file stores it as a camera held that way would
    upright = np.zeros((40, 60), np.uint8)
    upright[:20, :20] = 255
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    got, size = decode(save(image, exif=exif), "a.png")
    assert size == (40, 60)
    np.testing.assert_array_equal(got[..., 0], upright)
    reduced, size = decode(
        save(image.resize((stored.shape[1] * 8, stored.shape[0] * 8)), "JPEG", exif=exif), "a.jpg", at_least=(40, 60)
    )
    assert size == (320, 480) and reduced.shape[:2] == (40, 60)
    assert reduced[5, 5, 0] > 240 and reduced[5, 50, 0] < 15 and reduced[35, 5, 0] < 15


def test_jpeg_is_decoded_reduced_but_never_below_what_is_asked():
    data = save(Image.new("RGB", (1000, 800)), "JPEG")
    for asked, got in (
        ((100, 125), (100, 125)),
        ((101, 125), (200, 250)),
        ((400, 400), (400, 500)),
        ((900, 9), (800, 1000)),
    ):
        array, size = decode(data, "a.jpg", at_least=asked)
        assert (array.shape[:2], size) == (got, (800, 1000))


def test_pages_of_a_tiff_are_channels():
    bands = np.random.default_rng(1).integers(0, 65536, (6, 9, 11)).astype(np.uint16)
    first, *others = [Image.fromarray(b) for b in bands]
    got = pixels(save(first, "TIFF", save_all=True, append_images=others), "a.tif")
    np.testing.assert_array_equal(got, bands.transpose(1, 2, 0))


def test_tiff_with_many_samples_a_pixel():
    tifffile = pytest.importorskip("tifffile", reason="tifffile is optional")
    cube = np.random.default_rng(1).integers(0, 65536, (9, 11, 7)).astype(np.uint16)
    out = io.BytesIO()
    tifffile.imwrite(out, cube, photometric="minisblack", planarconfig="contig")
    np.testing.assert_array_equal(pixels(out.getvalue(), "a.tif"), cube)
    with pytest.raises(Unreadable, match="9×11×7 pixels are more than the limit of 692"):
        decode(out.getvalue(), "a.tif", Reading(max_pixels=692))


@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 5), (5, 7, 9)])
def test_npy_in_every_layout(shape):
    array = np.random.default_rng(2).random(shape, np.float32)
    out = io.BytesIO()
    np.save(out, array)
    got = pixels(out.getvalue(), "a.npy")
    expected = array[..., None] if array.ndim == 2 else array.transpose(1, 2, 0) if shape[0] == 5 else array
    np.testing.assert_array_equal(got, expected)


def test_animation_gives_its_first_frame():
    frames = [Image.new("L", (5, 5), value) for value in (10, 200)]
    assert pixels(save(frames[0], "GIF", save_all=True, append_images=frames[1:]), "a.gif")[0, 0, 0] == 10


# -- what cannot be read ---------------------------------------------------------------------------------------------


def pickled() -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([{"run": "me"}], dtype=object), allow_pickle=True)
    return out.getvalue()


NOISE = save(Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 90, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "name", "says"),
    [
        (b"", "a.png", "empty"),
        ("Grüße, this is no picture\n".encode(), "a.png", "holds text"),
        (bytes(range(256)) * 4, "a.png", "no image format"),
        (NOISE[: len(NOISE) // 2], "a.jpg", "ends too early"),
        (save(Image.new("RGB", (50, 50)))[:60], "a.png", "ends too early"),
        (pickled(), "a.npy", "pickle"),
        (b"\x93NUMPY", "a.npy", "fails"),
        (save(Image.new("L", (40, 40)))[:45] + b"\0" * 200, "a.png", "damaged|fails"),
    ],
)
def test_unreadable_says_why(data, name, says):
    for at_least in (None, (64, 64)):
        with pytest.raises(Unreadable, match=says):
            decode(data, name, at_least=at_least)


def test_decompression_bomb_is_refused_before_decoding():
    data = save(Image.new("1", (20_000, 20_000)))
    assert len(data) < 100_000
    with pytest.raises(Unreadable, match="bomb"):
        decode(data, "a.png")
    with pytest.raises(Unreadable, match="400 pixels are more than the limit of 399|20×20 pixels"):
        decode(save(Image.new("L", (20, 20))), "a.png", Reading(max_pixels=399))


# -- size, channels, range -------------------------------------------------------------------------------------------


def test_channels_convert_or_refuse():
    grey = np.full((2, 2, 1), 7, np.uint8)
    assert (to_channels(grey, 3) == 7).all() and to_channels(grey, 3).shape == (2, 2, 3)
    colour = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert to_channels(colour, 1)[0, :, 0].tolist() == [76, 150, 29]
    with pytest.raises(Unreadable, match="13 channels where 3"):
        to_channels(np.zeros((2, 2, 13)), 3)


@given(h=st.integers(1, 300), w=st.integers(1, 300), th=st.integers(1, 64), tw=st.integers(1, 64))
def test_fitted_region_has_the_targets_shape_and_lies_inside(h, w, th, tw):
    left, top, right, bottom = fit_box(h, w, (th, tw))
    assert 0 <= left < right <= w and 0 <= top < bottom <= h
    assert (right - left) * th == pytest.approx((bottom - top) * tw, rel=1e-6)
    assert min(w - (right - left), h - (bottom - top)) == pytest.approx(0, abs=1e-6)


def test_same_size_is_untouched_and_float_keeps_precision():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    assert resample(image, (0.0, 0.0, 9.0, 8.0), (8, 9)) is image
    cube = np.random.default_rng(0).random((16, 16, 5)).astype(np.float32)
    half = resample(cube, (0.0, 0.0, 16.0, 16.0), (1, 1))
    assert half.dtype == np.float32 and half.shape == (1, 1, 5)
    # the antialiasing filter is wider than a box, so the mean is met only roughly
    np.testing.assert_allclose(half[0, 0], cube.mean((0, 1)), atol=0.15)


def test_shrinking_is_antialiased():
    stripes = np.tile(np.array([[0, 255]], np.uint8), (64, 32))[..., None]
    small = resample(stripes, (0.0, 0.0, 64.0, 64.0), (8, 8))
    assert np.abs(small.astype(int) - 127).max() < 12


@pytest.mark.parametrize(
    ("dtype", "low", "high", "expected"),
    [
        (np.uint8, 3, 9, (0, 255)),
        (np.uint16, 3, 9, (0, 65535)),
        (np.float32, 0.1, 0.9, (0, 1)),
        (np.float32, 0.0, 200.0, (0, 255)),
        (np.float32, -1000.0, 3000.0, (-1000, 3000)),
    ],
)
def test_value_range(dtype, low, high, expected):
    assert value_range_of(np.dtype(dtype), low, high) == expected


def test_read_image_equals_what_a_loader_gives(tmp_path):
    from vitkit.data import make_loader, open_source

    for name in "ab":
        (tmp_path / name).mkdir()
        data = np.random.default_rng(ord(name)).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(data).save(tmp_path / name / "1.jpg")
    source = open_source(tmp_path)
    batch = next(iter(make_loader(source, [0, 1], (24, 32), 3, workers=0)))
    for image, key in zip(batch["images"], ("a/1.jpg", "b/1.jpg")):
        assert torch.equal(image, read_image(tmp_path / key, (24, 32), 3))


def test_read_image_names_the_file(tmp_path):
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(BadInput, match=r"x\.png cannot be used: it holds text"):
        read_image(tmp_path / "x.png", (8, 8), 3)
    with pytest.raises(BadInput, match=r"gone\.png cannot be opened"):
        read_image(tmp_path / "gone.png", (8, 8), 3)
    assert draft_size((3, 4)) == (6, 8)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_bytes_of_an_image_give_what_its_file_does(tmp_path, dtype, wide):
    array = (np.random.default_rng(0).random((20, 30, 3)) * 200).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    data = (tmp_path / "x.npy").read_bytes()
    image = image_from_bytes(data, "x.npy", (8, 8), 1, wide=wide)
    assert image.dtype == np.float32 and image.shape == (1, 8, 8) and image.flags.c_contiguous
    np.testing.assert_array_equal(image, read_image(tmp_path / "x.npy", (8, 8), 1, wide=wide).numpy())


def test_the_name_of_bytes_is_never_opened(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(BadInput, match=r"x\.png cannot be used: it holds text"):
        image_from_bytes(b"text", str(tmp_path / "x.png"), (8, 8), 3)
    with pytest.raises(BadInput, match="16 are expected|channels"):
        image_from_bytes((tmp_path / "x.png").read_bytes(), "x", (8, 8), 16)


def test_decoding_needs_no_torch_and_functions_keep_their_names():
    code = (
        "import sys, vitkit.data.decode; assert 'torch' not in sys.modules; "
        "import vitkit.data.long_tail, vitkit.data.point_domains, vitkit.data; "
        "assert all(callable(getattr(vitkit.data, name)) or name == 'AUGMENTATIONS' for name in vitkit.data.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
