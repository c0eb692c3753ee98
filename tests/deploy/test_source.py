from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from vitkit.deploy.source import Source
from vitkit.errors import BadInput


def test_the_model_is_copied_and_left_as_it_is(model, images, tmp_path):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    source = Source(model, images, tmp_path)
    source.program()
    assert model.training and next(model.parameters()).requires_grad
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images[:40]))
    np.testing.assert_allclose(source.logits(images[:40], batch=16), expected.numpy(), rtol=0, atol=1e-5)


def test_the_program_takes_any_batch(model, images, tmp_path):
    source = Source(model, images, tmp_path)
    network = source.program().module()
    assert source.fixed_batch is None
    for batch in (1, 2, 7):
        assert network(torch.from_numpy(images[:batch])).shape == (batch, 10)


class _NeedsOne(nn.Module):
    def forward(self, x):
        # a number read off the batch size binds it
        return torch.cat([x.flatten(1)[i : i + 1] for i in range(len(x))]) * float(len(x))


def test_a_graph_that_depends_on_the_batch_is_exported_for_one_image(images, tmp_path):
    source = Source(_NeedsOne(), images, tmp_path)
    network = source.program().module()
    assert source.fixed_batch == 1
    assert network(torch.from_numpy(images[:1])).shape == (1, 64)


def test_images_that_do_not_fit_are_named(model, tmp_path):
    with pytest.raises(BadInput, match=r"\(N, C, H, W\)"):
        Source(model, np.zeros((3, 8, 8)), tmp_path)
    with pytest.raises(BadInput, match="3 channels and 8×8 pixels"):
        Source(model, np.zeros((3, 3, 8, 8), np.float32), tmp_path)


def test_codes_that_a_method_chose_are_exported_as_they_are(model, images, tmp_path):
    pytest.importorskip("openvino")
    from vitkit.compress.quantize.rtn import rtn

    coded, _ = rtn(model, torch.from_numpy(images), w_bits=4)
    source = Source(coded, images, tmp_path)
    held = {tuple(c.flatten().tolist()) for n, c in coded.state_dict().items() if n.endswith(".codes")}
    constants = [op for op in source.openvino().get_ops() if op.get_type_name() == "Constant"]
    found = {tuple(op.data.flatten().tolist()) for op in constants if op.get_output_element_type(0).to_string() == "i8"}
    assert held and held <= found
    with pytest.raises(BadInput, match="integer codes already"):
        source.openvino(quantized=True)


class _Sorts(nn.Module):
    def forward(self, x):
        return torch.linalg.qr(x.flatten(2))[0].flatten(1)


def test_an_operator_without_an_onnx_form_is_named(images, tmp_path):
    pytest.importorskip("onnxscript")
    source = Source(_Sorts(), images, tmp_path)
    with pytest.raises(BadInput, match="qr"):
        source.onnx()
    assert not (tmp_path / "plain.onnx").exists()
