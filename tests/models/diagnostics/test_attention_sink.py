from __future__ import annotations

import pytest
import torch

from vitkit.anatomy import Intervene, add, uniform_attention
from vitkit.errors import BadInput
from vitkit.models.backbones.edit_host import EDIT
from vitkit.models.diagnostics.attention_sink import attention_sink, sequential_maps
from vitkit.models.normalized import NormalizedModel
from vitkit.testing.checks import check_probe
from vitkit.testing.worlds import tiny_vit


def host(**options):
    model = tiny_vit(img_size=(12, 20), in_chans=3, num_classes=5, embed_dim=16, depth=2, num_heads=2, **options)
    return model.eval()


IMAGES = torch.rand(3, 3, 12, 20, generator=torch.Generator().manual_seed(0))


def test_even_attention_has_no_sink():
    model = host(reg_tokens=4)
    with Intervene(model, {"blocks.*.attn.weights": uniform_attention()}):
        rows = attention_sink(model, IMAGES)
    for row in rows:
        # 15 patches, class token and 4 registers
        assert row.class_mass == pytest.approx(1 / 20)
        assert row.max_patch == pytest.approx(15 / 20)
        assert row.num_sinks == 0


def test_a_known_sink_is_counted():
    model = host()

    def drain(weights, _):
        # everything to patches 3 and 7, a quarter of it to the class token
        out = torch.zeros_like(weights)
        out[..., 0], out[..., 1 + 3], out[..., 1 + 7] = 0.25, 0.45, 0.3
        return out

    bump = torch.zeros(16, 16)
    bump[1 + 5] = 100.0
    with Intervene(model, {"blocks.1.attn.weights": drain, "blocks.1.resid_post": add(bump)}):
        first, second = attention_sink(model, IMAGES)
    assert second.class_mass == pytest.approx(0.25)
    assert second.max_patch == pytest.approx(0.45 * 15)
    assert second.num_sinks == 2
    assert second.num_outliers == 1
    assert first.depth == 0 and first.num_outliers == 0


@torch.no_grad()
def test_class_mass_is_the_mean_over_patch_queries_and_heads():
    from vitkit.anatomy import Trace

    model = host()
    with Trace(model, ["blocks.*.attn.weights"]) as trace:
        model(IMAGES)
    expected = trace["blocks.1.attn.weights"][:, :, 1:, 0].mean()
    assert attention_sink(model, IMAGES)[1].class_mass == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("share", ["none", "all"])
def test_sequential_maps(share):
    vit = host(reg_tokens=2)
    edit = EDIT.from_vit(vit, share=share)
    maps = sequential_maps(edit, IMAGES)
    assert maps.shape == (3, 2, 2, 15)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 2))
    # a state that asks for nothing looks everywhere
    edit.read_out.state.zero_()
    for layer in (edit.blocks if share == "all" else edit.read_out.layers)[:1]:
        layer.norm1.bias.zero_()
        linear = layer.attn.qkv if share == "all" else layer.attn.q
        linear.bias[:16].zero_()
    torch.testing.assert_close(sequential_maps(edit, IMAGES)[:, 0], torch.full((3, 2, 15), 1 / 15))
    wrapped = NormalizedModel(edit, [0.5] * 3, [0.25] * 3)
    shifted = sequential_maps(edit, (IMAGES - 0.5) / 0.25)
    torch.testing.assert_close(sequential_maps(wrapped, IMAGES), shifted)


@torch.no_grad()
def test_maps_of_merged_tokens_are_spread_over_their_patches():
    from vitkit.compress.merge.tome import tome

    edit = EDIT.from_vit(host())
    merged, _ = tome(edit, IMAGES, r=2)
    maps = sequential_maps(merged, IMAGES)
    assert maps.shape == (3, 2, 2, 15)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 2))


def test_probes_leave_the_model_alone():
    check_probe(attention_sink)
    check_probe(
        sequential_maps, model=NormalizedModel(EDIT.from_vit(_square()), [0.5] * 3, [0.25] * 3), places=_place()
    )


def _place():
    from vitkit.testing.checks import PLACES

    return PLACES[:1]


def _square():
    return tiny_vit(img_size=(20, 28), in_chans=3, num_classes=5, embed_dim=16, depth=2, num_heads=2)


def test_bad_input():
    with pytest.raises(BadInput, match="outlier=1"):
        attention_sink(host(), IMAGES, outlier=1.0)
    with pytest.raises(BadInput, match="EDIT decoder"):
        sequential_maps(host(), IMAGES)
