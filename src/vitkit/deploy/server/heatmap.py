"""Heat maps as PNG: alone in grey, or in colour over the image they explain."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

#: from dark to bright in even steps of lightness, readable also without colour vision
_COLOURS = np.array(
    [(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)], np.float32
)
_SMALLEST_SIDE = 224


def heat_png(heat: np.ndarray, over: np.ndarray | None = None) -> bytes:
    """Draw a heat map.

    Args:
        heat: (H, W) in [0, 1]; what is no number counts as 0.
        over: the image (C, H, W) in [0, 1] it belongs to; None draws the map alone, black is 0 and white 1, at (H, W).

    Returns: a PNG; over an image it is in colour, and small images are enlarged by a whole number to at least 224
        pixels, so that their pixels stay visible.
    """
    heat = np.clip(np.nan_to_num(np.asarray(heat, np.float32), nan=0.0, posinf=1.0, neginf=0.0), 0, 1)
    buffer = io.BytesIO()
    if over is None:
        Image.fromarray(np.rint(heat * 255).astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()
    height, width = over.shape[1:]
    times = max(1, -(-_SMALLEST_SIDE // max(height, width)))
    size = (width * times, height * times)
    shown = over[:3] if over.shape[0] >= 3 else np.repeat(over[:1], 3, 0)
    pixels = np.rint(np.clip(shown, 0, 1).transpose(1, 2, 0) * 255).astype(np.uint8)
    grey = Image.fromarray(pixels).convert("L").resize(size, Image.Resampling.NEAREST)
    values = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR))
    steps = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(values, steps, _COLOURS[:, c]) for c in range(3)], -1)
    # where the map is weak the image shows through, so that it stays recognisable
    weight = (0.25 + 0.55 * values)[..., None]
    mixed = (1 - weight) * np.asarray(grey, np.float32)[..., None] + weight * colours
    Image.fromarray(np.rint(mixed).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
