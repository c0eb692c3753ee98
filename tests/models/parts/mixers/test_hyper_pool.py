"""Hyper-pool: membership by sign of the cosine, hyperedges and patches that keep to themselves when unlinked."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import vitkit
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.hyper_pool import Adjacency, HyperPool, Membership, aggregate, distribute
from vitkit.models.vit import ViT

LAYOUT = TokenLayout(grid=(3, 5))


def part(**options) -> HyperPool:
    torch.manual_seed(0)
    return HyperPool(16, 4, **{"edges": 6, "features": 8, **options}).eval()


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 15, 16, generator=torch.Generator().manual_seed(seed))


def test_members_are_those_at_less_than_a_right_angle():
    torch.manual_seed(0)
    adjacency = Adjacency(16, 8)
    vertices, edges = torch.randn(2, 9, 16), torch.randn(2, 4, 16)
    allowed = torch.rand(9, 4) > 0.3
    links = adjacency(vertices, edges, allowed)
    cosine = F.cosine_similarity(adjacency.vertex(vertices)[:, :, None], adjacency.edge(edges)[:, None], dim=-1)
    assert torch.equal(links.hard, (cosine > 0) & allowed)
    assert torch.allclose(links.soft, (4 * cosine).sigmoid() * allowed, atol=1e-6)
    assert torch.equal(links.soft > 0.5, links.hard)
    assert bool((links.soft[:, ~allowed] == 0).all())


def test_the_update_equals_a_loop():
    mixer, x = part(), tokens()
    with torch.no_grad():
        links = mixer.membership(x, LAYOUT)
        want = torch.zeros_like(x)
        for b in range(2):
            edges = mixer.edges[0].clone()
            for j in range(6):
                mine = links.hard[b, :, j]
                if mine.any():
                    query = mixer.norm1(mixer.edges[0, j])
                    bias = links.log[b, mine, j].reshape(1, 1, 1, -1)
                    edges[j] += mixer.aggregate(query.reshape(1, 1, -1), x[b : b + 1, mine], bias)[0, 0]
            for i in range(15):
                mine = links.hard[b, i]
                if mine.any():
                    bias = links.log[b, i, mine].reshape(1, 1, 1, -1)
                    want[b, i] = mixer.distribute(x[b : b + 1, i : i + 1], mixer.norm2(edges)[None, mine], bias)[0, 0]
        assert torch.allclose(mixer(x, LAYOUT), want, atol=1e-5)


def test_the_unlinked_keep_their_state_without_nan():
    mixer = part()
    vertices, edges = tokens().requires_grad_(), torch.randn(2, 6, 16, requires_grad=True)
    log = torch.zeros(2, 15, 6, requires_grad=True)
    hard = torch.ones(2, 15, 6, dtype=torch.bool)
    hard[0, :, 2] = False
    hard[1, 4] = False
    links = Membership(log, hard, None)
    up, down = aggregate(mixer.aggregate, edges, vertices, links), distribute(mixer.distribute, vertices, edges, links)
    assert bool((up[0, 2] == 0).all()) and bool((down[1, 4] == 0).all())
    assert bool((up[0, 1] != 0).any()) and bool((down[1, 5] != 0).any())
    (up.square().sum() + down.square().sum()).backward()
    assert all(bool(torch.isfinite(leaf.grad).all()) for leaf in (vertices, edges, log))


def test_soft_membership_carries_the_gradient():
    mixer, x = part(), tokens()
    mixer(x, LAYOUT).square().sum().backward()
    assert bool((mixer.adjacency.vertex.weight.grad != 0).any())
    assert bool((mixer.edges.grad != 0).any())


def test_patches_may_be_permuted_and_padding_is_no_member():
    mixer, x = part(), tokens()
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([x, 9 * torch.randn(2, 4, 16)], 1)
    with torch.no_grad():
        straight = mixer(x, LAYOUT)
        assert torch.allclose(mixer(x[:, order], LAYOUT), straight[:, order], atol=1e-5)
        layout = LAYOUT.replace(valid=(torch.arange(19) < 15).expand(2, -1))
        assert torch.allclose(mixer(padded, layout)[:, :15], straight, atol=1e-5)
        assert bool((mixer(padded, layout)[:, 15:] == 0).all())


def test_a_merged_token_counts_for_its_patches():
    mixer, x = part(), tokens()
    doubled = torch.cat([x, x[:, 3:4]], 1)
    sizes = torch.ones(2, 15)
    sizes[:, 3] = 2
    with torch.no_grad():
        assert torch.allclose(mixer(x, LAYOUT.replace(sizes=sizes)), mixer(doubled, LAYOUT)[:, :15], atol=1e-5)


def test_prefix_tokens_attend_to_everything_as_before():
    torch.manual_seed(0)
    host = ViT(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2).eval()
    x, layout = torch.randn(2, 17, 16), TokenLayout(grid=(4, 4), prefix=(("class", 1),))
    with torch.no_grad():
        before = host.blocks[0].attn(x, layout)
        vitkit.swap(host, "mixer", "hyper-pool", edges=5)
        assert torch.allclose(host.blocks[0].attn(x, layout)[:, 0], before[:, 0], atol=1e-6)
    with pytest.raises(BadInput, match="built for tokens without prefix"):
        part()(x, layout)
    with pytest.raises(BadInput, match="at least 1"):
        part(edges=0)
