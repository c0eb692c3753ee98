"""The interactive FFN on a grid: what reaches what, and the limit in which it is an MLP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitkit
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mlps.interactive_ffn import InteractiveFFN
from vitkit.models.vit import ViT


def layout(p: int = 1) -> TokenLayout:
    return TokenLayout(grid=(3, 4), prefix=(("class", p),) if p else ())


@pytest.mark.parametrize("p", [0, 1, 5])
def test_without_kernel_and_norm_it_is_an_mlp_with_one_more_activation(p):
    part = InteractiveFFN(8, 16, batch_norm=False)
    nn.init.zeros_(part.dwconv.weight)
    nn.init.zeros_(part.dwconv.bias)
    x, gelu = torch.randn(2, p + 12, 8), nn.GELU()
    hidden = gelu(part.fc1(x))
    hidden = torch.cat([hidden[:, :p], gelu(hidden[:, p:])], 1)
    assert torch.allclose(part(x, layout(p)), part.fc2(hidden), atol=1e-6)


def test_a_patch_hears_its_neighbours_and_no_prefix():
    part = InteractiveFFN(8, 16).eval()
    x = torch.randn(1, 13, 8, requires_grad=True)
    part(x, layout())[0, 1].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist() == [1, 2, 5, 6]
    x.grad = None
    part(x, layout())[0, 0].sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist() == [0]


def test_a_loop_over_cells_gives_the_same():
    part = InteractiveFFN(4, 6, batch_norm=False)
    x = torch.randn(1, 12, 4)
    u = nn.functional.gelu(part.fc1(x))[0].view(3, 4, 6)
    kernel, out = part.dwconv.weight[:, 0], torch.zeros(3, 4, 6)
    for r in range(3):
        for c in range(4):
            total = u[r, c] + part.dwconv.bias
            for i in range(-1, 2):
                for j in range(-1, 2):
                    if 0 <= r + i < 3 and 0 <= c + j < 4:
                        total = total + kernel[:, i + 1, j + 1] * u[r + i, c + j]
            out[r, c] = nn.functional.gelu(total)
    assert torch.allclose(part(x, layout(0))[0], part.fc2(out.view(12, 6)), atol=1e-5)


def test_takes_over_the_linear_layers_and_refuses_merged_tokens():
    model = ViT(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=2)
    weight = model.blocks[0].mlp.fc1.weight.clone()
    vitkit.swap(model, "mlp", InteractiveFFN)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, weight)
    merged = layout().take(torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match="every cell of the 3×4 grid"):
        InteractiveFFN(8, 16)(torch.randn(1, 3, 8), merged)
