"""Bytes of an image file to pixels, and pixels to the size and channels a model takes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vitkit.errors import BadInput

_ENDINGS = "jpg jpeg jpe jfif png bmp gif tif tiff webp ppm pgm pbm pnm jp2 tga avif npy"
EXTENSIONS = frozenset(f".{ending}" for ending in _ENDINGS.split())

Alpha = Literal["white", "black", "drop", "keep"]
Fit = Literal["crop", "squash"]

# EXIF tag 0x0112 says how the sensor was held; the values are those of the standard
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Pillow warns of (damaged EXIF, huge sizes): it is told by us, with the file's name, or harmless.

    To be entered outside threads, since the filters of Python's warnings are global.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


class Unreadable(Exception):
    """One image cannot be used; the text says why, without the file's name."""


@dataclass(frozen=True)
class Reading:
    """How files become pixels.

    Args:
        alpha: what transparency becomes: composited on "white" or "black", dropped ("drop"), or kept as a channel.
        max_pixels: a larger image is refused before it is decoded (a small file can claim a billion pixels).
    """

    alpha: Alpha = "white"
    max_pixels: int = 89_478_485


def decode(
    data: bytes, name: str, how: Reading | None = None, at_least: tuple[int, int] | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode one file.

    Upright (EXIF), palette, CMYK and other colour spaces become RGB, 1-bit becomes 0/255, 16-bit grey stays uint16,
    pages of a TIFF become channels; of an animation the first frame is taken.

    Args:
        data: the file's bytes.
        name: its name; only ``.npy`` is told by the name, images by their content.
        how: see :class:`Reading`.
        at_least: (H, W); a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides stay at least this
            large, which costs a fraction of a full decode.

    Returns: pixels (H, W, C) in the file's own type, and the (H, W) of the full image.

    Raises: Unreadable.
    """
    how = how or Reading()
    if not data:
        raise Unreadable("the file is empty (0 bytes)")
    try:
        if name.lower().endswith(".npy"):
            array = _npy(data)
            return array, array.shape[:2]
        return _image(data, how, at_least)
    except Unreadable:
        raise
    except Exception as error:
        # image decoders raise anything from KeyError to zlib.error on damaged files; each is the file's fault
        raise Unreadable(_reason(error, data)) from error


def _image(data: bytes, how: Reading, at_least: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            array = _tiff(data, how)
            return array, array.shape[:2]
        raise
    with image:
        width, height = image.size
        if width * height > how.max_pixels:
            raise Unreadable(_too_large(f"{width}×{height}", how.max_pixels))
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        lies = orientation in (5, 6, 7, 8)
        full = (width, height) if lies else (height, width)
        if at_least is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, at_least if lies else at_least[::-1])  # type: ignore[arg-type]
        if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            return _pages(image, how), full
        image.load()
        if orientation in _TURNS:
            return to_array(image.transpose(_TURNS[orientation]), how.alpha), full
        return to_array(image, how.alpha), full


def _too_large(size: str, limit: int) -> str:
    return (
        f"its {size} pixels are more than the limit of {limit:,} (a decompression bomb?); max_pixels raises the limit"
    )


def to_array(image: Image.Image, alpha: Alpha) -> np.ndarray:
    mode = image.mode
    if mode in ("L", "RGB"):
        array = np.asarray(image)
    elif mode == "1":
        array = np.asarray(image.convert("L"))
    elif mode.startswith("I;16"):
        # the mode's letter B or L is the byte order of the buffer, which numpy must be told
        array = np.asarray(image).astype(np.uint16)
    elif mode == "I":
        array = np.asarray(image)
        if array.min() >= 0 and array.max() <= 65535:
            # some formats can only hand 16-bit values out as 32-bit ones
            array = array.astype(np.uint16)
    elif mode == "F":
        array = _finite(np.asarray(image))
    elif mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        grey = mode in ("LA", "La", "L")
        array = _without_alpha(np.asarray(image.convert("RGBA")), grey, alpha)
    else:
        array = np.asarray(image.convert("RGB"))
    return array[..., None] if array.ndim == 2 else array


def _without_alpha(rgba: np.ndarray, grey: bool, alpha: Alpha) -> np.ndarray:
    colour, opacity = (rgba[..., :1] if grey else rgba[..., :3]), rgba[..., 3:]
    if alpha == "keep":
        return np.concatenate([colour, opacity], -1)
    if alpha == "drop":
        return np.ascontiguousarray(colour)
    share = opacity.astype(np.float32) / 255
    ground = 255.0 if alpha == "white" else 0.0
    return np.rint(colour * share + ground * (1 - share)).astype(np.uint8)


def _pages(image: Image.Image, how: Reading) -> np.ndarray:
    """Pages of a TIFF that fit together are channels (multispectral cameras write them so); else the first page."""
    pages = []
    count = getattr(image, "n_frames", 1)
    if count * image.size[0] * image.size[1] > how.max_pixels:
        raise Unreadable(_too_large(f"{count}×{image.size[0]}×{image.size[1]}", how.max_pixels))
    for page in range(count):
        image.seek(page)
        image.load()
        pages.append(to_array(image, how.alpha))
    if len({(p.shape[:2], p.dtype) for p in pages}) == 1:
        return np.concatenate(pages, -1)
    return pages[0]


def _tiff(data: bytes, how: Reading) -> np.ndarray:
    """TIFF kinds Pillow has no mode for: more than four samples a pixel, 64-bit, tiles with predictors."""
    try:
        import tifffile
    except ImportError as error:
        raise Unreadable("it is a TIFF with more channels than Pillow reads: pip install tifffile") from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        shape = file.series[0].shape
        if math.prod(shape) > how.max_pixels:
            raise Unreadable(_too_large("×".join(map(str, shape)), how.max_pixels))
        return _channels_last(np.asarray(file.asarray()))


def _npy(data: bytes) -> np.ndarray:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise Unreadable("the array does not hold numbers")
    return _channels_last(array)


def _channels_last(array: np.ndarray) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) → (H, W, C): channels are the axis that is shorter than both others."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise Unreadable(f"an array of shape {array.shape} is no image; (H, W), (H, W, C) or (C, H, W) is")
    if channels_first(array.shape):
        array = np.ascontiguousarray(np.moveaxis(array, 0, -1))
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    return _finite(array)


def channels_first(shape: tuple[int, ...]) -> bool:
    """True if the last three sizes read as (C, H, W): the first is the smallest and the last is not 1, 3 or 4."""
    first, middle, last = shape[-3:]
    return last not in (1, 3, 4) and first < middle and first < last


def _finite(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise Unreadable("it holds NaN or infinite pixels")
    return array


def _reason(error: Exception, data: bytes) -> str:
    text = str(error)
    if isinstance(error, Image.DecompressionBombError):
        return "it claims more pixels than fit in memory (a decompression bomb?)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it holds text, not an image" if _is_text(data) else "its content is no image format known here"
    if "truncated" in text or "Truncated" in text or "not enough" in text or "broken data stream" in text:
        return "the file ends too early (truncated or damaged)"
    if "pickle" in text:
        return "it holds Python objects (a pickle), which can run code and is refused"
    return f"decoding fails: {text or type(error).__name__}"


def _is_text(data: bytes) -> bool:
    head = data[:512]
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return False
        text = head[: error.start].decode("utf-8")
    return all(c.isprintable() or c.isspace() for c in text)


# -- to what a model takes -------------------------------------------------------------------------------------------


def to_channels(array: np.ndarray, chans: int) -> np.ndarray:
    """(H, W, c) → (H, W, chans): grey is repeated, colour becomes luminance (ITU-R 601).

    Raises: Unreadable if the numbers of channels have nothing to do with each other.
    """
    have = array.shape[2]
    if have == chans:
        return array
    if have == 1:
        return np.repeat(array, chans, 2)
    if have == 3 and chans == 1:
        grey = array.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
        return (np.rint(grey) if array.dtype.kind in "iu" else grey).astype(array.dtype)[..., None]
    raise Unreadable(f"it has {have} channels where {chans} are expected")


def fit_box(height: int, width: int, size: tuple[int, int], fit: Fit = "crop") -> tuple[float, float, float, float]:
    """The region (left, top, right, bottom) of an image that becomes ``size`` (H, W).

    "crop": the largest centred region of the target's shape, so that nothing is distorted; "squash": all of it.
    """
    if fit == "squash":
        return 0.0, 0.0, float(width), float(height)
    # the binding side is taken whole, not recomputed: a rounding error would put the region outside the image
    if height * size[1] <= width * size[0]:
        w = min(float(width), height * size[1] / size[0])
        left = (width - w) / 2
        return left, 0.0, min(left + w, float(width)), float(height)
    h = min(float(height), width * size[0] / size[1])
    top = (height - h) / 2
    return 0.0, top, float(width), min(top + h, float(height))


def resample(array: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """Cut ``box`` out of (H, W, C) pixels and bring it to ``size`` (H, W), antialiased; uint8 stays, else float32."""
    height, width, chans = array.shape
    if box == (0.0, 0.0, float(width), float(height)) and (height, width) == size:
        return array if array.dtype == np.uint8 else array.astype(np.float32)
    if array.dtype == np.uint8 and chans in (1, 3):
        image = Image.fromarray(array[..., 0] if chans == 1 else array)
        out = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, box=box))
        return out[..., None] if chans == 1 else out
    kind = np.uint8 if array.dtype == np.uint8 else np.float32
    planes = [
        Image.fromarray(np.ascontiguousarray(array[..., c], dtype=kind)).resize(
            size[::-1], Image.Resampling.BILINEAR, box=box
        )
        for c in range(chans)
    ]
    return np.stack([np.asarray(p) for p in planes], -1)


def value_range_of(dtype: np.dtype, low: float, high: float) -> tuple[float, float]:
    """What counts as black and white: the type's own range, or for floats and signed numbers one read off the values.

    Floats within [0, 1] or [0, 255] keep that meaning; anything else is scaled from its smallest to its largest value.
    """
    if dtype in (np.uint8, np.uint16):
        return 0.0, float(np.iinfo(dtype).max)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    if low >= 0 and high <= 255:
        return 0.0, 255.0
    return float(low), float(high if high > low else low + 1)


def to_unit(array: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Pixels → float32 in [0, 1]. 8- and 16-bit files use their type's range, whatever ``value_range`` says."""
    low, high = value_range_of(array.dtype, 0, 0) if array.dtype in (np.uint8, np.uint16) else value_range
    return np.clip((array.astype(np.float32) - low) / (high - low), 0, 1)


def read_image(
    path: str | Path,
    image_size: tuple[int, int],
    in_chans: int,
    fit: Fit = "crop",
    value_range: tuple[float, float] | None = None,
    how: Reading | None = None,
    wide: bool = False,
) -> Any:
    """One image file as a model's input, prepared as a loader does for evaluation.

    Args:
        path: image or ``.npy`` file.
        image_size, in_chans, fit, value_range, how, wide: see :func:`image_from_bytes`.

    Returns: tensor (C, H, W), float32 in [0, 1].

    Raises: BadInput, naming the file.
    """
    import torch

    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be opened: {error.strerror or error}.") from error
    return torch.from_numpy(image_from_bytes(data, str(path), image_size, in_chans, fit, value_range, how, wide))


def image_from_bytes(
    data: bytes,
    name: str,
    image_size: tuple[int, int],
    in_chans: int,
    fit: Fit = "crop",
    value_range: tuple[float, float] | None = None,
    how: Reading | None = None,
    wide: bool = False,
) -> np.ndarray:
    """The bytes of one image file as a model's input, prepared as a loader does for evaluation. Needs no torch.

    Args:
        data: the file's bytes.
        name: for messages; only ``.npy`` is told by it, and no file of that name is opened.
        image_size: (H, W) of the result.
        in_chans: channels of the result.
        fit: see :func:`fit_box`.
        value_range: black and white of images that are neither 8- nor 16-bit; None: read off this image.
        how: see :class:`Reading`.
        wide: resize 8-bit images as floats too, as a loader does where others have more than 8 bits.

    Returns: (C, H, W), float32 in [0, 1].

    Raises: BadInput, naming the image.
    """
    try:
        array, _ = decode(data, name, how, at_least=draft_size(image_size))
        array = to_channels(array, in_chans)
    except Unreadable as error:
        raise BadInput(f"{name} cannot be used: {error}.") from error
    box = fit_box(array.shape[0], array.shape[1], image_size, fit)
    if array.dtype == np.uint8 and not wide:
        # round once, after resizing, exactly where a loader does
        out = resample(array, box, image_size).astype(np.float32) / 255
    else:
        limits = value_range or value_range_of(array.dtype, float(array.min()), float(array.max()))
        out = resample(to_unit(array, limits), box, image_size)
    return np.ascontiguousarray(out.transpose(2, 0, 1))


def draft_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """How large a JPEG must at least be decoded for ``image_size``: twice, so that antialiasing still decides."""
    return 2 * image_size[0], 2 * image_size[1]
