from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from vitkit.anatomy import host
from vitkit.deploy.adapters import folded
from vitkit.deploy.engines import Setting, engine
from vitkit.deploy.source import Source
from vitkit.models.normalized import NormalizedModel


@pytest.fixture
def adapted(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], modules_to_save=["head"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def test_lora_is_added_to_the_weights(adapted, model, images):
    before = sum(p.numel() for p in adapted.parameters())
    x = torch.from_numpy(images)
    with torch.no_grad():
        expected = adapted(x)
        found = folded(deepcopy(adapted))
        torch.testing.assert_close(found(x), expected)
    assert sum(p.numel() for p in found.parameters()) < before
    assert not any("lora" in name for name, _ in found.named_modules())
    assert host(found).blocks[0].attn.qkv.__class__ is nn.Linear


def test_an_engine_gets_one_product_in_place_of_three(adapted, images, tmp_path):
    inside = NormalizedModel(adapted, [0.5], [0.25]).eval()
    weights = {k: v.clone() for k, v in inside.state_dict().items()}
    source = Source(inside, images, tmp_path)
    products = [n for n in source.program().graph.nodes if n.target is torch.ops.aten.linear.default]
    # per block qkv, proj, fc1, fc2, and the head
    assert len(products) == 4 * 2 + 1
    with torch.no_grad():
        np.testing.assert_allclose(source.logits(images), inside(torch.from_numpy(images)), atol=1e-4)
    assert all(torch.equal(weights[k], v) for k, v in inside.state_dict().items())


class Prompted(nn.Module):
    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit, self.prompts = vit, nn.Parameter(torch.randn(1, 5, vit.embed_dim))

    def forward(self, x):
        x, layout = self.vit.embed(x)
        at = layout.num_prefix
        x = torch.cat([x[:, :at], self.prompts.expand(x.shape[0], -1, -1), x[:, at:]], 1)
        return self.vit.readout(*self.vit.run(x, layout.replace(prefix=(*layout.prefix, ("prompt", 5)))))


@pytest.mark.parametrize("name", ["torch-eager", "onnxruntime", "openvino"])
def test_prompts_are_part_of_the_graph(name, model, images, tmp_path):
    module = engine(name)
    if module.unavailable():
        pytest.skip(module.unavailable())
    source = Source(Prompted(model), images, tmp_path)
    (tmp_path / "made").mkdir()
    module.make(source, "f32", tmp_path / "made")
    runner = module.load(tmp_path / "made", "f32", Setting(8, 2))
    expected = source.logits(images)
    assert source.fixed_batch is None
    assert np.abs(runner.run(images) - expected).max() < 1e-4 * expected.std()
    assert np.abs(expected - Source(model, images, tmp_path).logits(images)).max() > 0.01


def test_a_model_without_adapters_is_left_alone(model):
    assert folded(model) is model
