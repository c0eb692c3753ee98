"""Expert pooling: k experts share all the weight, and hyperedges are preferred to patches."""

from __future__ import annotations

import pytest
import torch

import vitkit
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.readouts.expert_pool import ExpertPool
from vitkit.models.vit import ViT

EDGES = TokenLayout(grid=(2, 5), prefix=(("class", 1), ("virtual", 2), ("edge", 4), ("virtual_edge", 2)))
PLAIN = TokenLayout(grid=(2, 5), prefix=(("class", 1),))


def part(**options) -> ExpertPool:
    torch.manual_seed(0)
    return ExpertPool(8, 3, **options).eval()


def tokens(layout: TokenLayout, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, layout.num_prefix + 10, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("layout", "num"), [(EDGES, 6), (PLAIN, 10)])
def test_k_experts_share_the_weight_and_the_rest_have_none(layout, num):
    readout, x = part(experts=3), tokens(layout)
    weights = readout.weights(x, layout)
    assert weights.shape == (2, num)
    assert ((weights > 0).sum(1) == 3).all() and torch.allclose(weights.sum(1), torch.ones(2))
    rows = readout.ln(x[:, 3:9] if layout is EDGES else x[:, 1:])
    confidence = readout.confidence(rows).squeeze(-1)
    assert torch.equal((weights > 0).nonzero(), (confidence >= confidence.sort(1).values[:, [-3]]).nonzero())
    for b in range(2):
        kept = weights[b] > 0
        assert torch.allclose(weights[b][kept], confidence[b][kept].softmax(0), atol=1e-6)


def test_logits_read_hyperedges_and_the_mean_patch():
    readout, x = part(), tokens(EDGES)
    with torch.no_grad():
        normed = readout.ln(x)
        voted = (readout.weights(x, EDGES).unsqueeze(2) * normed[:, 3:9]).sum(1)
        want = readout.fc(torch.cat([voted, normed[:, 9:].mean(1)], 1))
        assert torch.allclose(readout([(x, EDGES)], EDGES), want, atol=1e-6)
        changed = x.clone()
        changed[:, :3] += 1
        assert torch.equal(readout([(changed, EDGES)], EDGES), readout([(x, EDGES)], EDGES))


def test_only_the_last_state_is_read_and_patches_may_be_permuted():
    readout, x = part(), tokens(EDGES)
    order = torch.cat([torch.arange(9), 9 + torch.randperm(10)])
    with torch.no_grad():
        out = readout([(tokens(EDGES, 5), EDGES), (x, EDGES)], EDGES)
        assert torch.allclose(readout([(x[:, order], EDGES)], EDGES), out, atol=1e-6)


def test_padding_is_no_expert_and_sizes_weigh_the_mean():
    readout, x = part(), tokens(PLAIN)
    padded = torch.cat([x, 9 * torch.randn(2, 3, 8)], 1)
    layout = PLAIN.replace(valid=(torch.arange(13) < 10).expand(2, -1))
    doubled, sizes = torch.cat([tokens(EDGES), tokens(EDGES)[:, 12:13]], 1), torch.ones(2, 10)
    sizes[:, 3] = 2
    with torch.no_grad():
        assert torch.allclose(readout([(padded, layout)], layout), readout([(x, PLAIN)], PLAIN), atol=1e-6)
        merged = readout([(tokens(EDGES), EDGES.replace(sizes=sizes))], EDGES)
        assert torch.allclose(merged, readout([(doubled, EDGES)], EDGES), atol=1e-6)


def test_more_experts_than_rows_and_none():
    assert bool((part(experts=50).weights(tokens(EDGES), EDGES) > 0).all())
    with pytest.raises(BadInput, match="at least 1"):
        part(experts=0)


def test_it_reads_the_hyperedges_of_swapped_blocks():
    torch.manual_seed(0)
    model = ViT(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3).eval()
    vitkit.swap(model, "block", "hgvt-block", vertices=2, edges=4, virtual_edges=2)
    vitkit.swap(model, "readout", "expert-pool", experts=2)
    x, layout = model.run(*model.embed(torch.randn(2, 3, 16, 16)))
    assert model.read_out.weights(x, layout).shape == (2, 6)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)
