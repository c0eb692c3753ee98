from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from vitkit.cli.predict import predict_files
from vitkit.deploy.server import make_app
from vitkit.deploy.torch_model import TorchModel
from vitkit.errors import BadInput
from vitkit.models.io import ModelConfig, construct, save_model

VIT = ModelConfig(
    base="vit_femto",
    base_options={"img_size": [16, 16], "num_classes": 3},
    image_size=(16, 16),
    classes=("a", "b", "c"),
)
CNN = ModelConfig(base="resnet10t", base_options={"num_classes": 2}, image_size=(32, 32), classes=("a", "b"))


def save(folder, config, seed: int = 0):
    torch.manual_seed(seed)
    model = construct(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    save_model(model, config, folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "tiny-vit", VIT)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return path


def test_the_server_answers_as_predict_does(vit, image):
    expected = predict_files(vit, [image])[0]
    model = TorchModel(vit, best_batch=2)
    assert (model.name, model.task, model.labels, model.best_batch) == ("tiny-vit", "classify", ("a", "b", "c"), 2)
    with TestClient(make_app(model)) as client:
        row = client.post("/predict", files={"images": image.read_bytes()}).json()["predictions"][0]
        assert row["label"] == expected["label"]
        for name, value in expected["probabilities"].items():
            assert row["probabilities"][name] == pytest.approx(value, abs=2e-6)
        assert client.get("/model").json()["facts"]["temperature"] == 1.0
        maps = []
        for method in model.explainers:
            answer = client.post("/explain", params={"method": method}, files={"images": image.read_bytes()})
            assert answer.status_code == 200 and answer.headers["x-target"] == expected["label"], method
            maps.append(np.asarray(Image.open(io.BytesIO(answer.content))))
        assert all(heat.shape == (16, 16) and heat.min() == 0 and heat.max() == 255 for heat in maps)


def test_temperature_changes_how_sure_it_is_and_not_what_it_says(vit):
    logits = np.array([[2.0, 1.0, 0.0]], np.float32)
    cold, warm = (TorchModel(vit, temperature=t, best_batch=1).probabilities(logits)[0] for t in (1.0, 2.0))
    np.testing.assert_allclose(warm, np.exp([1, 0.5, 0]) / np.exp([1, 0.5, 0]).sum(), rtol=1e-6)
    assert warm.argmax() == cold.argmax() and warm.max() < cold.max()


def test_explainers_are_those_that_fit_the_network(vit, tmp_path):
    of_vit = TorchModel(vit, best_batch=1).explainers
    of_cnn = TorchModel(save(tmp_path, CNN), best_batch=1).explainers
    assert {"rollout", "grad-cam", "gmar"} <= set(of_vit)
    assert "grad-cam" in of_cnn and not {"rollout", "gmar"} & set(of_cnn)


def test_the_map_is_about_the_target(vit, image):
    model = TorchModel(vit, best_batch=1)
    pixels = model.prepare(image.read_bytes(), "x.png")
    maps = [model.explain(pixels, "grad-cam", target) for target in range(3)]
    assert all(m.dtype == np.float32 and m.shape == (16, 16) and 0 <= m.min() <= m.max() <= 1 for m in maps)
    assert not np.allclose(maps[0], maps[1]) and not np.allclose(maps[1], maps[2])


def test_the_best_batch_is_measured(vit, monkeypatch):
    # 10 ms a batch and 1 ms an image: twice the batch is worth it until the fixed part hardly counts
    monkeypatch.setattr(TorchModel, "_seconds", lambda self, images: 0.010 + 0.001 * len(images))
    assert TorchModel(vit).best_batch == 64
    # as fast alone: several together as long as nobody waits for it
    monkeypatch.setattr(TorchModel, "_seconds", lambda self, images: 0.02 * len(images))
    assert TorchModel(vit).best_batch == 4
    monkeypatch.setattr(TorchModel, "_seconds", lambda self, images: 0.2 * len(images))
    assert TorchModel(vit).best_batch == 1
    monkeypatch.setattr(TorchModel, "_seconds", lambda self, images: 0.001 * len(images) ** 1.2)
    assert TorchModel(vit).best_batch == 1
    monkeypatch.setattr(TorchModel, "_seconds", lambda self, images: 0.3 + 0.1 * len(images))
    assert TorchModel(vit).best_batch == 1 + 1


def test_no_model(tmp_path):
    with pytest.raises(BadInput, match=r"config\.json"):
        TorchModel(tmp_path)
