"""Every part and the small network of every file as ONNX, beside PyTorch; a note says why one is not, and is true."""

from __future__ import annotations

import math

import pytest
import torch

from vitkit.testing import PLACES, NotConforming
from vitkit.testing.onnx import onnx_case, onnx_gap, onnx_names

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", onnx_names())
def test_exports_to_onnx_or_says_why_not(name):
    model, images, note = onnx_case(name)
    with torch.no_grad():
        scale = float(model(images).abs().max())
    assert 0 < scale < math.inf
    other = torch.rand(images.shape, generator=torch.Generator().manual_seed(2))
    try:
        gap, reason = onnx_gap(model, images, other), ""
    except NotConforming as error:
        gap, reason = math.inf, str(error)
    if note:
        assert gap > 1e-3 * scale, f"{name} exports, although its note says {note!r}; take the note out"
    else:
        assert gap < 1e-3 * scale, f"{reason or gap}; document the reason in onnx_note"


def test_the_way_out_that_the_note_of_s4d_names():
    from vitkit.models.swap import swap

    model, images = PLACES[0].host(), PLACES[0].images()
    swap(model, "mixer", "s4d", init="real")
    with torch.no_grad():
        scale = float(model.eval()(images).abs().max())
    assert onnx_gap(model, images, images.flip(-1)) < 1e-3 * scale
