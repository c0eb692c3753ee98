from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.data.decode import fit_box, resample
from vitkit.deploy.pixels import FromPixels, export_preparation


def by_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    out = [resample(p, fit_box(*p.shape[:2], size), size) for p in pixels]
    return np.stack(out).astype(np.float32).transpose(0, 3, 1, 2) / 255


sides = st.integers(1, 40)


@settings(deadline=None, max_examples=60)
@given(sides, sides, sides, sides, st.sampled_from([1, 3, 4]), st.integers(0, 999))
def test_it_does_what_a_loader_does(height, width, new_height, new_width, chans, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (2, height, width, chans), dtype=np.uint8)
    found = FromPixels((new_height, new_width))(torch.from_numpy(pixels)).numpy()
    # Pillow rounds after the columns and again after the rows
    assert np.abs(found - by_pillow(pixels, (new_height, new_width))).max() <= 1.01 / 255


def test_an_image_of_the_right_size_is_only_scaled():
    pixels = torch.randint(0, 256, (3, 9, 14, 3), dtype=torch.uint8)
    found = FromPixels((9, 14))(pixels)
    torch.testing.assert_close(found, pixels.permute(0, 3, 1, 2) / 255, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 40, 25), (1, 8, 90)])
def test_one_program_takes_all_sizes(shape):
    program = export_preparation((16, 12), 3).module()
    pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    torch.testing.assert_close(program(pixels), FromPixels((16, 12))(pixels))
