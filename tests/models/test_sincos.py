"""Sine–cosine codes: the formula, term by term."""

from __future__ import annotations

import math

import pytest
import torch

from vitkit.models.sincos import sincos, sincos_2d, sincos_clip


def test_a_code_is_its_sines_then_its_cosines():
    code = sincos(torch.tensor([0.0, 3.0, 41.5]), 6)
    for row, place in zip(code, (0.0, 3.0, 41.5)):
        angles = [place * 10000 ** (-2 * k / 6) for k in range(3)]
        expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_a_clip_has_half_of_its_channels_for_the_date_and_half_for_the_place():
    dates = torch.tensor([[0.0, 12.0, 41.0], [3.0, 4.0, 5.0]])
    codes = sincos_clip(dates, (2, 5), 16)
    assert codes.shape == (2, 3, 10, 16)
    for series in range(2):
        for t in range(3):
            assert torch.equal(codes[series, t, :, :8], sincos(dates[series, t], 8).expand(10, -1))
            assert torch.equal(codes[series, t, :, 8:], sincos_2d((2, 5), 8))


def test_widths_that_do_not_divide_are_refused():
    for call, needed in (
        (lambda: sincos(torch.zeros(1), 3), "odd"),
        (lambda: sincos_2d((1, 1), 6), "multiple of 4"),
        (lambda: sincos_clip(torch.zeros(1, 1), (1, 1), 12), "multiple of 8"),
    ):
        with pytest.raises(ValueError, match=needed):
            call()
