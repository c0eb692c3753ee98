"""All engines keep one contract: made files answer like the model, in any batch, after a reload."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkit.compress.merge.dymu import dymu
from vitkit.deploy.artefact import run_in_batches
from vitkit.deploy.engines import ENGINES, Setting, engine, lacking
from vitkit.deploy.source import Source
from vitkit.errors import UnknownName

# largest difference to the model's logits, in their standard deviations
_CLOSE = {"f32": 1e-4, "bf16": 0.05, "int8": 0.2, "int8+bf16": 0.2, "int8-static": 0.3, "int8-dynamic": 0.2}
_CLOSE |= {"int4-weights": 0.6}
_QUICK = ("torch-eager", "onnxruntime", "openvino")


def _offers():
    for name in _QUICK:
        module = engine(name)
        if not module.unavailable():
            yield from ((name, precision) for precision in module.precisions())


@pytest.mark.parametrize(("name", "precision"), list(_offers()))
def test_an_engine_answers_like_the_model(name, precision, model, images, tmp_path):
    source = Source(model, images, tmp_path)
    folder = tmp_path / "made"
    folder.mkdir()
    module = engine(name)
    module.make(source, precision, folder)
    expected = source.logits(images)
    for setting in module.settings(8, 2):
        runner = module.load(folder, precision, setting)
        for batch in (1, 3, 8, len(images)):
            found = run_in_batches(runner, images[:batch], source.fixed_batch or "any")
            assert found.dtype == np.float32 and found.shape == (batch, 10)
            assert np.abs(found - expected[:batch]).max() < _CLOSE[precision] * expected.std()
        first, second = runner.run(images[:2]), runner.run(images[2:4])
        # an answer is not overwritten by the next one
        np.testing.assert_array_equal(first, runner.run(images[:2]))
        assert not np.array_equal(first, second)
        assert isinstance(runner.describe(), dict)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch-compile", "aotinductor", "torchao"])
def test_a_compiling_engine_answers_like_the_model(name, model, images, tmp_path):
    module = engine(name)
    if module.unavailable():
        pytest.skip(module.unavailable())
    source = Source(model, images, tmp_path)
    expected = source.logits(images)
    for precision in module.precisions():
        folder = tmp_path / precision
        folder.mkdir()
        module.make(source, precision, folder)
        runner = module.load(folder, precision, Setting(8, 2))
        assert np.abs(runner.run(images[:8]) - expected[:8]).max() < 0.5


def test_every_engine_says_what_it_lacks():
    for name in ENGINES:
        said = engine(name).unavailable()
        assert said == "" or "install" in said or "CUDA" in said
    assert lacking({"no_such_package": "deploy"}, "This") == (
        'This needs no_such_package: pip install "vitkit[deploy]"'
    )
    with pytest.raises(UnknownName, match="openvino"):
        engine("openvin")


@pytest.mark.parametrize("name", [name for name in _QUICK if not engine(name).unavailable()])
def test_images_keep_as_many_tokens_as_they_need_in_every_engine(name, model, images, tmp_path):
    merging, _ = dymu(model, torch.from_numpy(images), target_tokens=9)
    source = Source(merging, images, tmp_path)
    folder = tmp_path / "made"
    folder.mkdir()
    module = engine(name)
    module.make(source, "f32", folder)
    assert source.fixed_batch is None
    runner = module.load(folder, "f32", Setting(8, 2))
    expected = source.logits(images)
    for batch in (1, 3, len(images)):
        assert np.abs(runner.run(images[:batch]) - expected[:batch]).max() < 1e-4 * expected.std()
