"""HyperGraph Attention: its hyperedges are exact, its topology guides or masks, and order does not matter."""

from __future__ import annotations

import pytest
import torch

import vitkit
from vitkit.errors import BadInput, UnknownName
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.hypergraph import CHOICES, TOPOLOGIES, HypergraphAttention
from vitkit.models.vit import ViT
from vitkit.testing import PLACES, check_part

WITH_CLASS = TokenLayout(grid=(4, 6), prefix=(("class", 1), ("register", 2)))
WITHOUT = TokenLayout(grid=(4, 6))


def part(**options) -> HypergraphAttention:
    torch.manual_seed(0)
    return HypergraphAttention(16, 4, **{"centers": 5, "k": 3, **options}).eval()


def tokens(layout: TokenLayout, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, layout.num_prefix + 24, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", [WITH_CLASS, WITHOUT])
def test_centres_and_members_equal_a_loop(layout):
    mixer, x = part(), tokens(layout)
    centers, members, h = mixer.hypergraph(x, layout)
    for b in range(2):
        patches = x[b, layout.num_prefix :]
        looking = x[b, 0] if layout.num_prefix else patches.mean(0)
        wanted = sorted(range(24), key=lambda i: -float(looking @ patches[i]))[:5]
        assert centers[b].tolist() == wanted
        for j, c in enumerate(wanted):
            near = sorted(range(24), key=lambda i: (i != c, -float(patches[c] @ patches[i])))[:3]
            assert members[b, j].tolist() == near
            assert h[b, :, j].nonzero()[:, 0].tolist() == sorted(near)


@pytest.mark.parametrize("choose", CHOICES)
def test_every_hyperedge_has_exactly_k_members_and_its_centre(choose):
    mixer, x = part(choose=choose), tokens(WITH_CLASS)
    centers, members, h = mixer.hypergraph(x, WITH_CLASS)
    assert h.shape == (2, 24, 5) and bool((h.sum(1) == 3).all())
    assert torch.equal(members[:, :, 0], centers)
    assert bool((h.gather(1, centers.unsqueeze(1)).diagonal(dim1=1, dim2=2) == 1).all())


def test_as_many_hyperedges_as_patches_start_as_the_patches_in_centre_order():
    mixer, x = part(centers=24, k=1), tokens(WITH_CLASS)
    edges, _, _ = mixer._guided(x, WITH_CLASS)
    centers = mixer.hypergraph(x, WITH_CLASS).centers
    assert torch.equal(centers.sort(1).values, torch.arange(24).expand(2, -1))
    assert torch.allclose(edges, x[:, 3:].gather(1, centers.unsqueeze(2).expand(-1, -1, 16)))


def test_the_mask_leaves_no_attention_outside_the_hyperedges():
    mixer, x = part(topology="mask"), tokens(WITH_CLASS)
    h = mixer.hypergraph(x, WITH_CLASS).incidence.bool()
    to_edges, to_nodes = mixer.weights(x, WITH_CLASS)
    outside = ~h.transpose(1, 2).unsqueeze(1).expand(-1, 4, -1, -1)
    assert bool((to_edges[..., 3:][outside] == 0).all()) and bool((to_edges[..., 3:][~outside] > 0).all())
    assert bool((to_nodes[:, :, 3:][~h.unsqueeze(1).expand(-1, 4, -1, -1)] == 0).all())
    covered = h.any(2)
    assert not covered.all(), "the test needs a patch in no hyperedge"
    sums = to_nodes[:, :, 3:].sum(-1)
    assert torch.allclose(sums, covered.unsqueeze(1).expand_as(sums).float(), atol=1e-6)
    with torch.no_grad():
        assert bool((mixer(x, WITH_CLASS)[:, 3:][~covered] == 0).all())
    assert bool((to_nodes[:, :, :3] > 0).all()), "prefix tokens hear every hyperedge"


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("choose", ["cls", "norm"])
def test_rows_sum_to_one_and_patches_may_be_permuted(topology, choose):
    mixer, x = part(topology=topology, choose=choose), tokens(WITH_CLASS)
    to_edges, to_nodes = mixer.weights(x, WITH_CLASS)
    assert torch.allclose(to_edges.sum(-1), torch.ones(2, 4, 5), atol=1e-6)
    if topology != "mask":
        assert torch.allclose(to_nodes.sum(-1), torch.ones(2, 4, 27), atol=1e-6)
    order = torch.cat([torch.arange(3), 3 + torch.randperm(24, generator=torch.Generator().manual_seed(1))])
    with torch.no_grad():
        assert torch.allclose(mixer(x[:, order], WITH_CLASS), mixer(x, WITH_CLASS)[:, order], atol=1e-5)


def test_the_update_equals_the_equations():
    mixer, x = part(), tokens(WITH_CLASS)
    with torch.no_grad():
        mixer.edge_bias.copy_(torch.tensor([0.5, -1, 2, 0]))
        mixer.node_bias.copy_(torch.tensor([1.0, 3, -2, 0.5]))
        h = mixer.hypergraph(x, WITH_CLASS).incidence
        degree = h.sum(2).clamp(min=1)
        guide = torch.zeros(2, 27, 5)
        guide[:, 3:] = h / (degree.sqrt().unsqueeze(2) * 3**0.5)
        e = h.transpose(1, 2) @ x[:, 3:] / 3
        up, down = mixer.to_edges, mixer.to_nodes

        def attend(attention, q_tokens, kv_tokens, bias):
            q, (k, v) = attention.q(q_tokens), attention.kv(kv_tokens).chunk(2, -1)
            split = [t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (q, k, v)]
            weights = (split[0] @ split[1].transpose(2, 3) / 2 + bias).softmax(-1)
            return attention.proj((weights @ split[2]).transpose(1, 2).flatten(2))

        e = e + attend(up, e, x, mixer.edge_bias.reshape(-1, 1, 1) * guide.transpose(1, 2).unsqueeze(1))
        want = attend(down, x, mixer.norm(e), mixer.node_bias.reshape(-1, 1, 1) * guide.unsqueeze(1))
        assert torch.allclose(mixer(x, WITH_CLASS), want, atol=1e-5)


def test_without_strength_the_bias_is_no_topology():
    biased, plain, x = part(), part(topology="none"), tokens(WITH_CLASS)
    plain.load_state_dict({k: v for k, v in biased.state_dict().items() if not k.endswith("_bias")})
    with torch.no_grad():
        assert not torch.allclose(biased(x, WITH_CLASS), plain(x, WITH_CLASS), atol=1e-4)
        biased.edge_bias.zero_()
        biased.node_bias.zero_()
        assert torch.allclose(biased(x, WITH_CLASS), plain(x, WITH_CLASS), atol=1e-6)


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_padding_changes_nothing_for_real_patches(choose, topology):
    mixer, x = part(choose=choose, topology=topology), tokens(WITH_CLASS)
    padded = torch.cat([x, 9 * torch.randn(2, 6, 16)], 1)
    layout = WITH_CLASS.replace(valid=(torch.arange(30) < 24).expand(2, -1))
    with torch.no_grad():
        assert torch.allclose(mixer(padded, layout)[:, :27], mixer(x, WITH_CLASS), atol=1e-5)


def test_a_merged_token_counts_for_its_patches():
    mixer, x = part(k=1, centers=2, topology="none"), tokens(WITHOUT)
    doubled = torch.cat([x, x[:, 5:6]], 1)
    sizes = torch.ones(2, 24)
    sizes[:, 5] = 2
    edges, (bias, _), _ = mixer._guided(x, WITHOUT.replace(sizes=sizes))
    with torch.no_grad():
        assert torch.allclose(mixer.to_edges(edges, x, bias), mixer.to_edges(edges, doubled), atol=1e-5)


def test_a_share_of_the_patches_follows_the_grid():
    mixer = part(centers=0.25, k=None)
    assert mixer.counts(196) == (49, 8) and mixer.counts(400) == (64, 12)
    assert mixer.counts(9) == (4, 4) and mixer.counts(1) == (1, 1)
    assert part(centers=16, k=8).counts(10) == (10, 8)


def test_the_issues_call_works():
    model = vitkit.build("vit_femto", img_size=28, in_chans=1, num_classes=10, mixer="hypergraph")
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert all(isinstance(block.attn, HypergraphAttention) for block in model.blocks)


def test_warm_start_takes_the_projections_over():
    host = ViT(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=4)
    weight = host.blocks[0].attn.qkv.weight.detach().clone()
    vitkit.swap(host, "mixer", "hypergraph")
    assert torch.equal(host.blocks[0].attn.to_edges.q.weight, weight[:16])
    assert torch.equal(host.blocks[0].attn.to_nodes.kv.weight, weight[16:])


@pytest.mark.parametrize(
    "options", [{"topology": "mask"}, {"choose": "kmeans"}, {"choose": "random", "topology": "none"}]
)
def test_other_options_conform(options):
    assert "gradients" in check_part(HypergraphAttention, places=PLACES[2:3], dynamo=False, **options).passed


def test_bad_options_are_refused():
    with pytest.raises(BadInput, match="whole number of centres"):
        part(centers=2.5)
    with pytest.raises(BadInput, match="at least one member"):
        part(k=0)
    with pytest.raises(UnknownName, match="topology"):
        part(topology="graph")
    with pytest.raises(UnknownName, match="centres"):
        part(choose="best")
