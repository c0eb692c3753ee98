"""DCT attention inside Swin's windows."""

from __future__ import annotations

import pytest
import timm
import torch

from vitkit.errors import BadInput
from vitkit.models.parts.mixers.dct_window import DCTWindowAttention, compress_windows


def swin() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=3,
    )
    for name, p in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize("scale", ["full", "head"])
def test_tau_one_reproduces_the_swin_shifted_windows_included(scale: str) -> None:
    model, images = swin(), torch.rand(3, 3, 32, 32)
    before = model(images)
    small = compress_windows(model, tau=1.0, scale=scale)
    torch.testing.assert_close(small(images), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


@pytest.mark.parametrize("scale", ["full", "head"])
def test_each_stage_shrinks_by_its_own_width(scale: str) -> None:
    model, images = swin(), torch.rand(3, 3, 32, 32)
    small = compress_windows(model, tau=0.5, scale=scale)
    widths = [m.qkv.in_features for m in small.modules() if isinstance(m, DCTWindowAttention)]
    assert widths == [8, 8, 16, 16]
    assert small(images).isfinite().all() and not torch.allclose(small(images), model(images))
    small.train()(images).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_refuses_other_models() -> None:
    with pytest.raises(BadInput, match="dct-attention"):
        compress_windows(torch.nn.Linear(2, 2))
    with pytest.raises(BadInput, match="tau=0"):
        compress_windows(swin(), tau=0)


def test_a_detour_through_half_precision_leaves_the_transform_exact() -> None:
    small, images = compress_windows(swin(), tau=0.5), torch.rand(2, 3, 32, 32)
    before, state = small(images), {name: value.clone() for name, value in small.state_dict().items()}
    small.bfloat16().float().load_state_dict(state)
    torch.testing.assert_close(small(images), before, rtol=0, atol=0)
