"""Hierarchical and convolutional networks of timm go through the exporters like plain ViTs."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from vitkit.deploy.engines import engine
from vitkit.deploy.source import Source
from vitkit.deploy.tuner import deploy

NETWORKS = {
    "swin_tiny_patch4_window7_224": {
        "img_size": 56, "window_size": 7, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4),
    },
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "resnet18": {"channels": (8, 16, 24, 32)},
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    model = timm.create_model(request.param, num_classes=5, **NETWORKS[request.param])
    # statistics of running batches are not those of a fresh network
    model.train()(torch.rand(8, 3, 56, 56))
    return model.eval()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).random((12, 3, 56, 56), dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "precision", "close"), [("openvino", "f32", 1e-4), ("onnxruntime", "int8-static", 0.5)]
)
def test_an_engine_answers_like_the_network(name, precision, close, network, pixels, tmp_path):
    module = engine(name)
    if module.unavailable():
        pytest.skip(module.unavailable())
    source = Source(network, pixels, tmp_path)
    folder = tmp_path / "made"
    folder.mkdir()
    module.make(source, precision, folder)
    runner = module.load(folder, precision, module.settings(4, 1)[0])
    expected = source.logits(pixels)
    for batch in (1, 4, 12):
        assert np.abs(runner.run(pixels[:batch]) - expected[:batch]).max() < close * expected.std()


def test_counters_of_batch_norm_do_not_stop_the_tuner(pixels, tmp_path):
    network = timm.create_model("resnet18", num_classes=5, **NETWORKS["resnet18"]).eval()
    found = deploy(network, pixels, out=tmp_path / "made", engines=["torch-eager"], precisions=["f32"], batches=(4,))
    assert found.chosen.engine == "torch-eager"
    np.testing.assert_allclose(
        found.load().run(pixels[:2]), network(torch.from_numpy(pixels[:2])).detach().numpy(), atol=1e-5
    )
