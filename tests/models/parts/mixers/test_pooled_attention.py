"""Without pooling it is the host's attention; with it, keys are a pooled grid."""

import pytest
import torch

import vitkit
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.pooled_attention import PooledAttention


def test_sr_1_equals_full_attention():
    vit = vitkit.build("vit_femto", img_size=8, in_chans=1, num_classes=3).eval()
    torch.nn.init.normal_(vit.head.weight)
    x = torch.rand(2, 1, 8, 8)
    before = vit(x)
    vitkit.swap(vit, "mixer", "pooled-attention", sr=1)
    torch.testing.assert_close(vit(x), before, atol=1e-4, rtol=1e-4)


def test_sr_1_counts_merged_tokens_and_ignores_padding():
    part = PooledAttention(8, 2, 1)
    x = torch.randn(1, 4, 8)
    x[:, 1] = x[:, 0]
    layout = TokenLayout(grid=(1, 4))
    merged = part(x[:, 1:], layout.regroup(torch.tensor([[0, 0, 1, 2]]), 3))
    torch.testing.assert_close(merged, part(x, layout)[:, 1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grid, keys", [((4, 6), 2 * 3), ((5, 7), 3 * 4)])
def test_number_of_keys_and_the_start_as_a_mean(grid, keys):
    part = PooledAttention(8, 2, 2)
    seen = {}
    part.attn.register_forward_pre_hook(lambda m, given: seen.update(kv=given[1]))
    x = torch.randn(1, 2 + grid[0] * grid[1], 8)
    part(x, TokenLayout(grid=grid, prefix=(("class", 2),)))
    assert seen["kv"].shape[1] == 2 + keys
    first = x[:, 2:].reshape(1, *grid, 8)[:, :2, :2].mean((1, 2))
    torch.testing.assert_close(seen["kv"][:, 2], part.norm(first))


def test_errors():
    with pytest.raises(BadInput, match="at least 1"):
        PooledAttention(8, 2, 0)
