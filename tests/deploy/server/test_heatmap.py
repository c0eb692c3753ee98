from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from vitkit.deploy.server.heatmap import heat_png


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def test_alone_it_is_the_scores():
    heat = np.array([[0, 0.5, 1], [np.nan, 2, -1]], np.float32)
    assert pixels(heat_png(heat)).tolist() == [[0, 128, 255], [0, 255, 0]]


@pytest.mark.parametrize("chans", [1, 2, 3, 5])
def test_over_an_image_of_any_channels(chans):
    rng = np.random.default_rng(0)
    over = rng.random((chans, 10, 30), np.float32)
    made = pixels(heat_png(np.linspace(0, 1, 300, dtype=np.float32).reshape(10, 30), over))
    assert made.shape == (80, 240, 3)


def test_more_heat_is_brighter():
    heat = np.repeat(np.linspace(0, 1, 300, dtype=np.float32)[None], 300, 0)
    made = pixels(heat_png(heat, np.full((3, 300, 300), 0.2, np.float32)))
    light = (made[0] @ [0.2126, 0.7152, 0.0722])[10:-10]
    # the image shows through by three quarters where there is no heat
    assert light[-1] - light[0] > 100 and (np.diff(light) > -1.5).all()
