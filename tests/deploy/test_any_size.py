from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from vitkit.anatomy import host
from vitkit.compress.merge.tome import tome
from vitkit.deploy import deploy
from vitkit.deploy.any_size import any_size
from vitkit.deploy.engines import Setting, engine
from vitkit.deploy.source import Source
from vitkit.errors import BadInput
from vitkit.models.build import build
from vitkit.models.io import ModelConfig
from vitkit.testing.worlds import tiny_vit


def options(prefix):
    return {"class_token": prefix > 0, "global_pool": "token" if prefix else "avg", "reg_tokens": max(0, prefix - 1)}


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_positions_are_resized_as_timm_does(prefix):
    vit = tiny_vit(12, 2, 1, 10, depth=2, **options(prefix)).eval()
    torch.nn.init.normal_(vit.head.weight)
    new, step = any_size(vit)
    assert step == 2 and host(vit).patch_embed.strict_img_size
    own = torch.rand(2, 1, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(new(own), vit(own))
        other = tiny_vit((18, 8), 2, 1, 10, depth=2, **options(prefix)).eval()
        weights = vit.state_dict()
        table = resample_abs_pos_embed(weights["pos_embed"], [9, 4], [6, 6], num_prefix_tokens=vit.num_prefix_tokens)
        other.load_state_dict({**weights, "pos_embed": table})
        x = torch.rand(2, 1, 18, 8)
        torch.testing.assert_close(new(x), other(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["torch-eager", "onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_engines_take_other_sizes(name, kind, model, images, tmp_path):
    module = engine(name)
    if module.unavailable():
        pytest.skip(module.unavailable())
    if kind == "resnet":
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", in_chans=1, num_classes=10).eval()
        images = np.random.default_rng(0).random((4, 1, 64, 64), dtype=np.float32)
    source = Source(model, images, tmp_path, free_size=True)
    (tmp_path / "made").mkdir()
    module.make(source, "f32", tmp_path / "made")
    runner = module.load(tmp_path / "made", "f32", Setting(8, 2))
    step = source.side_step
    height, width = images.shape[2:]
    for batch, size in ((2, (height, width)), (1, (height + step, width)), (3, (height + 3 * step, width + 2 * step))):
        x = np.random.default_rng(1).random((batch, 1, *size), dtype=np.float32)
        expected = source.logits(x)
        assert np.abs(runner.run(x) - expected).max() < 1e-4 * max(1.0, expected.std())


def test_an_artefact_of_free_size(model, images, tmp_path):
    pytest.importorskip("openvino")
    config = ModelConfig(base="x", image_size=(8, 8), in_chans=1, classes=tuple("abcdefghij"))
    found = deploy(
        model, images, out=tmp_path / "art", engines=["openvino"], precisions=["f32"], config=config, budget=20,
        free_size=True,
    ).load()  # fmt: skip
    assert found.manifest.side_step == 2 and any(key.startswith("at 10×12") for key in found.manifest.evidence)
    assert found.run(np.zeros((2, 1, 14, 6))).shape == (2, 10)
    with pytest.raises(BadInput, match="multiples of 2"):
        found.run(np.zeros((2, 1, 14, 7)))
    with pytest.raises(BadInput, match="choose one"):
        deploy(model, images, out=tmp_path / "b", bake=True, free_size=True)


def test_a_merging_model_takes_other_sizes_too(model, images, tmp_path):
    new, step = any_size(model)
    assert any_size(new) == (new, step)
    merged, _ = tome(new, r=2)
    source = Source(merged, images, tmp_path, free_size=True)
    assert source.side_step == step
    program = source.program().module()
    with torch.no_grad():
        for size in ((8, 8), (10, 14)):
            x = torch.rand(3, 1, *size)
            torch.testing.assert_close(program(x), merged(x), atol=1e-5, rtol=1e-4)


def test_what_is_made_for_one_size_is_refused(images, tmp_path):
    with pytest.raises(BadInput, match="one image size"):
        any_size(build("vit_femto", img_size=16, in_chans=1, num_classes=3, tokenizer="charm"))
    with pytest.raises(BadInput, match="one image size"):
        any_size(build("vit_femto", img_size=16, in_chans=1, num_classes=3, position="loope"))

    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0], 192)

    source = Source(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), Fixed()), images.repeat(3, 1), tmp_path)
    assert source.export(source.model)
    fixed = Source(Fixed(), images.repeat(3, 1), tmp_path, free_size=True)
    with pytest.raises(BadInput):
        fixed.export(fixed.model)
