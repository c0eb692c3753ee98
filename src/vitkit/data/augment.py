"""Random changes of whole batches that leave the label true.

Every draw is a hash of (seed, epoch, image, what for), so it does not depend on the batch an image is in, on the worker
that prepares it, or on where a killed run started again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown

Strength = Literal["none", "light", "strong"]

#: name → what it does; ``augment=[…]`` takes any of them
AUGMENTATIONS = {
    "crop": "a random region of 50-100 % of the area, brought to full size",
    "shift": "moved by up to an eighth of the side, edges repeated",
    "flip": "mirrored left-right half the time",
    "vflip": "mirrored top-bottom half the time",
    "rotate90": "turned by a multiple of 90° (square images)",
    "color": "brightness, contrast and saturation changed by up to 30 %",
    "randaugment": "two of thirteen operations at magnitude 9 of 30",
    "erase": "a rectangle of 2-20 % of the area set to the image's mean, half the time",
}

_SMALL = 64
# each augmentation owns some columns of the table of draws, so that switching one off leaves the others as they are
_COLUMNS = {"crop": 0, "shift": 4, "flip": 6, "vflip": 7, "rotate90": 8, "color": 9, "erase": 12, "randaugment": 17}
_NUM_DRAWS = 24


def resolve(augment: str | Sequence[str], image_size: tuple[int, int], mirror: bool) -> tuple[str, ...]:
    """The names behind a strength, in the order in which they are applied.

    "light" is a shift (images up to 64 px) or a crop (larger ones), and a flip where ``mirror`` allows it; "strong"
    adds RandAugment (Cubuk et al., arXiv:1909.13719).

    Raises: UnknownName; BadInput for turning images that are not square.
    """
    if isinstance(augment, str):
        move = "shift" if max(image_size) <= _SMALL else "crop"
        light = (move, "flip") if mirror else (move,)
        levels: dict[str, tuple[str, ...]] = {"none": (), "light": light, "strong": (*light, "randaugment")}
        if augment not in levels:
            raise unknown("augmentation", augment, [*levels, *AUGMENTATIONS], "vitkit study --help")
        return levels[augment]
    for name in augment:
        if name not in AUGMENTATIONS:
            raise unknown("augmentation", name, AUGMENTATIONS, "vitkit study --help")
    if "rotate90" in augment and image_size[0] != image_size[1]:
        raise BadInput(f"augment='rotate90' needs square images; image_size is {image_size[0]}×{image_size[1]}.")
    return tuple(name for name in AUGMENTATIONS if name in augment)


def draws(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """(B, 24) numbers in [0, 1): the splitmix64 hash of (seed, epoch, index, column)."""
    with np.errstate(over="ignore"):
        x = _mix(np.full(1, seed & 0xFFFFFFFFFFFFFFFF, np.uint64))
        x = _mix(x + np.uint64(epoch & 0xFFFFFFFFFFFFFFFF))
        x = _mix(x + indices.astype(np.uint64)[:, None])
        x = _mix(x + np.arange(_NUM_DRAWS, dtype=np.uint64))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def crop_boxes(u: np.ndarray, scale: tuple[float, float] = (0.5, 1.0), ratio: float = 4 / 3) -> np.ndarray:
    """(B, 4) left, top, width, height of random regions, as shares of the whole.

    Area uniform in ``scale``; aspect log-uniform in [1/ratio, ratio] relative to the whole's, cut off where the region
    would not fit; place uniform.
    """
    u = u[:, _COLUMNS["crop"] : _COLUMNS["crop"] + 4]
    area = scale[0] + (scale[1] - scale[0]) * u[:, 0]
    aspect = np.exp((2 * u[:, 1] - 1) * np.log(ratio))
    aspect = np.clip(aspect, area, 1 / area)
    w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
    return np.stack([u[:, 2] * (1 - w), u[:, 3] * (1 - h), w, h], 1)


def move_pixels(images: np.ndarray, u: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Shift, flip, vflip and rotate90 of (B, H, W, C) pixels of any type, without interpolation."""
    b, h, w, _ = images.shape
    if "shift" in names:
        reach = max(1, round(min(h, w) / 8))
        top, left = (u[:, _COLUMNS["shift"] : _COLUMNS["shift"] + 2] * (2 * reach + 1)).astype(np.int64).T
        padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (h, w), axis=(1, 2))
        images = windows[np.arange(b), top, left].transpose(0, 2, 3, 1)
    moves: list[tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]] = []
    if "flip" in names:
        moves.append((u[:, _COLUMNS["flip"]] < 0.5, lambda x: x[:, :, ::-1]))
    if "vflip" in names:
        moves.append((u[:, _COLUMNS["vflip"]] < 0.5, lambda x: x[:, ::-1]))
    if "rotate90" in names:
        turns = (u[:, _COLUMNS["rotate90"]] * 4).astype(np.int64)
        moves += [(turns == k, lambda x, k=k: np.rot90(x, k, (1, 2))) for k in (1, 2, 3)]  # type: ignore[misc]
    if moves and "shift" not in names:
        # the batch may be the memory's own
        images = images.copy()
    for chosen, move in moves:
        images[chosen] = move(images[chosen])
    return images


def change_values(images: Tensor, u: np.ndarray, names: Sequence[str]) -> Tensor:
    """Colour, RandAugment and erasing of float images (B, C, H, W) in [0, 1]."""
    with _one_thread():
        return _change_values(images, u, names)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Many small operations: waking other threads for each costs more than it saves, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _change_values(images: Tensor, u: np.ndarray, names: Sequence[str]) -> Tensor:
    if "color" in names:
        factors = torch.from_numpy(0.7 + 0.6 * u[:, _COLUMNS["color"] : _COLUMNS["color"] + 3]).float()
        for column, operation in enumerate((_brightness, _contrast, _saturation)):
            images = operation(images, factors[:, column])
    if "randaugment" in names:
        images = randaugment(images, u[:, _COLUMNS["randaugment"] : _COLUMNS["randaugment"] + 4])
    if "erase" in names:
        images = _erase(images, u[:, _COLUMNS["erase"] : _COLUMNS["erase"] + 5])
    return images


# -- RandAugment -----------------------------------------------------------------------------------------------------


def randaugment(images: Tensor, u: np.ndarray, magnitude: int = 9) -> Tensor:
    """Two random operations on each image, each at the same magnitude with a random sign.

    Args:
        images: (B, C, H, W) in [0, 1].
        u: (B, 4) in [0, 1): operation and sign, twice.
        magnitude: 0…30.

    Paper: Cubuk et al., RandAugment, arXiv:1909.13719.
    Departs from the paper: no histogram equalisation; edges are filled with the image's mean; saturation acts on RGB
    images only and is brightness on others.
    """
    strength = magnitude / 30
    for turn in range(2):
        which = (u[:, 2 * turn] * len(_OPERATIONS)).astype(np.int64)
        sign = torch.from_numpy(np.where(u[:, 2 * turn + 1] < 0.5, -1.0, 1.0)).float()
        out = images.clone()
        # the five geometric ones are one sampling pass
        moved = np.flatnonzero(which < 5)
        if len(moved):
            at = torch.from_numpy(moved)
            out[at] = _affine(images[at], torch.from_numpy(which[moved]), strength * sign[at])
        for number in np.unique(which[which >= 5]):
            at = torch.from_numpy(np.flatnonzero(which == number))
            out[at] = _OPERATIONS[number](images[at], strength * sign[at])
        images = out
    return images


def _affine(x: Tensor, which: Tensor, amount: Tensor) -> Tensor:
    """Shear (up to 0.3), translation (up to 150/331 of the side) or rotation (up to 30°)."""
    theta = torch.eye(2, 3).repeat(len(x), 1, 1)
    ratio = x.shape[2] / x.shape[3]
    zero = torch.zeros_like(amount)
    angle = torch.where(which == 4, amount * (torch.pi / 6), zero)
    cos, sin = angle.cos(), angle.sin()
    # grids reach from −1 to 1 on both axes, so turning a picture that is not square needs its aspect
    theta[:, 0, 0], theta[:, 0, 1] = cos, -sin * ratio
    theta[:, 1, 0], theta[:, 1, 1] = sin / ratio, cos
    theta[:, 0, 1] += torch.where(which == 0, 0.3 * amount * ratio, zero)
    theta[:, 1, 0] += torch.where(which == 1, 0.3 * amount / ratio, zero)
    theta[:, 0, 2] = torch.where(which == 2, 300 / 331 * amount, zero)
    theta[:, 1, 2] = torch.where(which == 3, 300 / 331 * amount, zero)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    mean = x.mean((2, 3), keepdim=True)
    moved = F.grid_sample(x - mean, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (moved + mean).clamp_(0, 1)


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    f = factor[:, None, None, None]
    return (x * f + other * (1 - f)).clamp(0, 1)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, 0.0, factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _grey(x).mean((1, 2, 3), keepdim=True), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _grey(x), factor) if x.shape[1] == 3 else _brightness(x, factor)


def _sharpness(x: Tensor, factor: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13
    weight = kernel.repeat(x.shape[1], 1, 1, 1)
    smooth = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), weight, groups=x.shape[1])
    return _blend(x, smooth, factor)


def _posterize(x: Tensor, amount: Tensor) -> Tensor:
    levels = 2 ** (8 - (4 * amount.abs()).round())[:, None, None, None]
    return (x * 255 / (256 / levels)).floor() * (256 / levels) / 255


def _solarize(x: Tensor, amount: Tensor) -> Tensor:
    return torch.where(x >= 1 - amount.abs()[:, None, None, None], 1 - x, x)


def _autocontrast(x: Tensor, amount: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def _identity(x: Tensor, amount: Tensor) -> Tensor:
    return x


def _by_factor(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, amount: operation(x, 1 + 0.9 * amount)


# numbers 0-4 are the geometric ones, done together by _affine: shear x, y, translate x, y, rotate
_OPERATIONS: list[Callable[[Tensor, Tensor], Tensor]] = [
    *[_identity] * 5,
    _by_factor(_brightness),
    _by_factor(_contrast),
    _by_factor(_saturation),
    _by_factor(_sharpness),
    _posterize,
    _solarize,
    _autocontrast,
    _identity,
]


def _erase(images: Tensor, u: np.ndarray) -> Tensor:
    """Set a rectangle to the image's mean, half the time (random erasing)."""
    _, _, h, w = images.shape
    v = torch.from_numpy(u).float()
    area = 0.02 + 0.18 * v[:, 1]
    aspect = torch.exp((2 * v[:, 2] - 1) * np.log(3.0))
    tall, wide = (area / aspect).sqrt().clamp(max=1) * h, (area * aspect).sqrt().clamp(max=1) * w
    top, left = v[:, 3] * (h - tall), v[:, 4] * (w - wide)
    y, x = torch.arange(h)[None] + 0.5, torch.arange(w)[None] + 0.5
    rows = (y >= top[:, None]) & (y < (top + tall)[:, None])
    cols = (x >= left[:, None]) & (x < (left + wide)[:, None])
    mask = (rows[:, :, None] & cols[:, None, :] & (v[:, 0] < 0.5)[:, None, None])[:, None]
    return torch.where(mask, images.mean((2, 3), keepdim=True), images)
