"""DCT initialisation on the host and on other libraries' models."""

from __future__ import annotations

import pytest
import timm
import torch

from vitkit.compress.merge.tome import tome
from vitkit.errors import BadInput
from vitkit.models.build import build
from vitkit.models.dct import dct_matrix
from vitkit.models.parts.mixers.dct_attention import DCTAttention
from vitkit.models.parts.mixers.dct_init import DCTInitAttention, init_dct
from vitkit.models.swap import swap
from vitkit.models.vit import ViT


def host() -> ViT:
    torch.manual_seed(0)
    return ViT(img_size=8, patch_size=2, in_chans=1, num_classes=5, embed_dim=24, depth=2, num_heads=3)


@pytest.mark.parametrize("which", ["q", "k", "v", "qk", "kv", "qv", "qkv"])
@pytest.mark.parametrize("trainable", [True, False])
def test_only_the_chosen_projections_change(which: str, trainable: bool) -> None:
    model, plain = host(), host()
    names = init_dct(model, which, trainable)
    assert names == ("blocks.0.attn.qkv", "blocks.1.attn.qkv")
    parts = zip("qkv", model.blocks[1].attn.qkv.weight.chunk(3), plain.blocks[1].attn.qkv.weight.chunk(3))
    for letter, weight, before in parts:
        torch.testing.assert_close(weight, dct_matrix(24) if letter in which else before, rtol=0, atol=0)
    state = plain.state_dict()
    for name, value in model.state_dict().items():
        if "qkv" not in name:
            assert torch.equal(value, state[name])


def test_gram_matrix_is_preserved() -> None:
    model = host().double()
    init_dct(model, "qk")
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    q, k, _ = model.blocks[0].attn.heads(x)
    torch.testing.assert_close((q @ k.mT).sum(1), x @ x.mT)


def test_fixed_weights_stay_under_weight_decay() -> None:
    model = host()
    init_dct(model, "kv", trainable=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    query = model.blocks[0].attn.qkv.weight.chunk(3)[0].clone()
    model(torch.rand(4, 1, 8, 8)).square().sum().backward()
    optimizer.step()
    after = model.blocks[0].attn.qkv.weight.chunk(3)
    assert torch.equal(after[1], dct_matrix(24)) and torch.equal(after[2], dct_matrix(24))
    assert not torch.equal(after[0], query)
    other = host()
    init_dct(other, "kv", trainable=False)
    other.load_state_dict(model.state_dict())
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(other.eval()(images), model.eval()(images), rtol=0, atol=0)


def test_all_three_fixed_leave_only_biases() -> None:
    model = host()
    init_dct(model, "qkv", trainable=False)
    assert [name for name, _ in model.blocks[0].attn.qkv.named_parameters()] == ["bias"]
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 5)


def test_windows_and_stages_get_their_own_width() -> None:
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 2),
        num_classes=3,
    )
    names = init_dct(swin, "v", trainable=False)
    assert names == ("layers.0.blocks.0.attn.qkv", "layers.1.blocks.0.attn.qkv")
    for name, width in zip(names, (16, 32)):
        assert torch.equal(swin.get_submodule(name).weight.chunk(3)[2], dct_matrix(width))
    assert swin(torch.rand(1, 3, 32, 32)).shape == (1, 3)


def test_separate_projections_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config)
    names = init_dct(model, "qv", trainable=False)
    assert len(names) == 2
    for name in names:
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight, dct_matrix(16)) and not layer.weight.requires_grad


def test_as_a_part_it_can_be_swapped_in_and_out() -> None:
    model = host().eval()
    images = torch.rand(2, 1, 8, 8)
    before = model(images)
    record = swap(model, "mixer", DCTInitAttention, which="kv", trainable=False)
    direct = host().eval()
    init_dct(direct, "kv")
    torch.testing.assert_close(model(images), direct(images))
    record.undo()
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    swap(model, "mixer", DCTInitAttention, warm=False, which="q")
    assert not torch.equal(model.blocks[0].attn.proj.weight, direct.blocks[0].attn.proj.weight)


def test_errors_leave_the_model_alone() -> None:
    model = host()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for which in ("", "kq", "x", "vv"):
        if which == "kq":
            continue  # the order of letters is free
        with pytest.raises(BadInput, match="which="):
            init_dct(model, which)
    wide = ViT(img_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=3)
    wide.blocks[0].attn.qkv = torch.nn.Linear(24, 36)
    with pytest.raises(BadInput, match="square"):
        init_dct(wide)
    with pytest.raises(BadInput, match="no attention"):
        init_dct(torch.nn.Linear(3, 3))
    init_dct(model, "v", trainable=False)
    with pytest.raises(BadInput, match="freshly built"):
        init_dct(model, "v")
    assert torch.equal(model.state_dict()["blocks.0.attn.proj.weight"], before["blocks.0.attn.proj.weight"])


def test_attention_of_another_width_is_refused() -> None:
    model = host()
    swap(model, "mixer", DCTAttention, tau=0.5)
    with pytest.raises(BadInput, match="DCTAttention projects 12 of the 24 channels"):
        swap(model, "mixer", DCTInitAttention)


@pytest.mark.parametrize("options", [{"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}])
def test_it_has_a_name_and_works_with_any_prefix_and_merged_tokens(options: dict) -> None:
    model = build("vit_femto", img_size=(8, 12), patch_size=2, in_chans=2, num_classes=3, mixer="dct-init", **options)
    assert torch.equal(model.blocks[1].attn.qkv.weight.chunk(3)[2], dct_matrix(64))
    merged, _ = tome(model.eval(), r=3)
    assert merged(torch.rand(2, 2, 8, 12)).isfinite().all()
