from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vitkit.deploy import deploy, load
from vitkit.deploy.artefact import answer, run_in_batches
from vitkit.deploy.engines import engine as module_of
from vitkit.deploy.pixels import FromPixels
from vitkit.errors import BadInput
from vitkit.models.io import ModelConfig

pytest.importorskip("openvino")


@pytest.fixture
def folder(model, images, tmp_path):
    config = ModelConfig(base="x", image_size=(8, 8), in_chans=1, classes=tuple("abcdefghij"))
    deploy(model, images, out=tmp_path / "art", engines=["openvino"], precisions=["f32"], config=config, budget=20)
    return tmp_path / "art"


def test_it_answers_like_the_model(folder, model, images):
    found = load(folder)
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(found.run(images), expected, atol=1e-4 * expected.std())
    probs = found.probabilities(found.run(images[:3]))
    np.testing.assert_allclose(probs.sum(1), 1)
    assert found.describe()["engine"] == "openvino" and found.explainers == ()
    with pytest.raises(BadInput, match=r"takes images of shape \(B, 1, 8, 8\)"):
        found.run(np.zeros((1, 3, 8, 8)))


def test_image_files_are_prepared_as_in_training(folder, model, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    path = tmp_path / "one.png"
    Image.fromarray(pixels).save(path)
    found = load(folder)
    row = found.predict([path])[0]
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels / np.float32(255))[None, None])[0]
    assert row["label"] == "abcdefghij"[int(logits.argmax())]
    assert sum(row["probabilities"].values()) == pytest.approx(1)
    with pytest.raises(BadInput, match=r"missing\.png"):
        found.predict([tmp_path / "missing.png"])
    with pytest.raises(BadInput, match="empty"):
        found.prepare(b"", "nothing.png")


def test_it_runs_without_torch(folder, images):
    buffer = io.BytesIO()
    Image.fromarray((images[0, 0] * 255).astype(np.uint8)).save(buffer, "PNG")
    (folder.parent / "one.png").write_bytes(buffer.getvalue())
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from vitkit.deploy import load\n"
        f"model = load({str(folder)!r})\n"
        f"print(model.predict([{str(folder.parent / 'one.png')!r}])[0]['label'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == load(folder).predict([folder.parent / "one.png"])[0]["label"]


def test_changed_weights_are_refused(folder):
    with (folder / "model.bin").open("r+b") as stream:
        stream.seek(10)
        stream.write(b"\1\2\3")
    with pytest.raises(BadInput, match=r"model\.bin was changed"):
        load(folder)


def test_an_engine_that_is_not_installed_gives_the_command(folder, monkeypatch):
    from vitkit.deploy.engines import openvino

    monkeypatch.setattr(openvino, "unavailable", lambda: 'OpenVINO needs openvino: pip install "vitkit[deploy]"')
    with pytest.raises(BadInput, match="pip install"):
        load(folder)


def test_an_unknown_engine_is_named(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"engine": "openvin"}))
    with pytest.raises(LookupError, match="openvino"):
        load(folder)


def test_a_fixed_batch_is_padded_and_split():
    seen = []

    class Runner:
        def run(self, images):
            seen.append(len(images))
            return images.reshape(len(images), -1).sum(1, keepdims=True)

        def describe(self):
            return {}

    images = np.arange(7 * 4, dtype=np.float32).reshape(7, 1, 2, 2)
    np.testing.assert_array_equal(run_in_batches(Runner(), images, 3), images.reshape(7, -1).sum(1, keepdims=True))
    assert seen == [3, 3, 3]


def test_answers_of_other_tasks():
    assert answer(np.array([1.5]), ("kg",), "regress") == {"values": {"kg": 1.5}}
    found = answer(np.array([0.9, 0.2, 0.6]), ("a", "b", "c"), "multilabel")
    assert found["label"] == ["a", "c"]


@pytest.mark.parametrize(
    ("engine", "precision"),
    [("openvino", "f32"), ("openvino", "int8"), *(("onnxruntime", p) for p in ("f32", "int8-static", "int4-weights"))],
)
def test_with_resizing_baked_in_it_takes_pixels_of_any_size(engine, precision, model, images, tmp_path):
    if module_of(engine).unavailable() or precision not in module_of(engine).precisions():
        pytest.skip(f"{engine} {precision} is not here")
    config = ModelConfig(base="x", image_size=(8, 8), in_chans=1, classes=tuple("abcdefghij"))
    options = {"engines": [engine], "precisions": [precision], "config": config, "budget": 20, "max_drop": 50}
    images = np.rint(images * 255).astype(np.float32) / 255
    plain = deploy(model, images, out=tmp_path / "plain", **options).load()
    baked = deploy(model, images, out=tmp_path / "baked", bake=True, **options).load()
    spread = plain.run(images).std()
    # quantized activations may round the other way
    near = 1e-4 if precision == "f32" else 0.05
    np.testing.assert_allclose(baked.run(images), plain.run(images), atol=near * spread)
    pixels = np.random.default_rng(2).integers(0, 256, (3, 29, 21, 1), dtype=np.uint8)
    prepared = FromPixels((8, 8))(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(baked.run_pixels(pixels), plain.run(prepared), atol=near * spread)
    assert baked.manifest.takes == "pixels" and baked.manifest.evidence["baked"]["drop"] <= 50
    with pytest.raises(BadInput, match="--bake"):
        plain.run_pixels(pixels)
    with pytest.raises(BadInput, match=r"\(B, H, W, 1\) and type uint8"):
        baked.run_pixels(pixels.astype(np.float32))


def test_bad_baking(model, images, tmp_path):
    wide = ModelConfig(base="x", image_size=(8, 8), in_chans=1, wide=True)
    with pytest.raises(BadInput, match="8-bit"):
        deploy(model, images, out=tmp_path / "a", bake=True, config=wide)
    with pytest.raises(BadInput, match="cannot take the preparation"):
        deploy(model, images, out=tmp_path / "a", bake=True, engines=["torch-eager"])
