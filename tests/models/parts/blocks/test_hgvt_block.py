"""The hypergraph block: who may see whom, who keeps its state, and what its two losses measure."""

from __future__ import annotations

import pytest
import torch

import vitkit
from vitkit.errors import BadInput
from vitkit.models.graph import scattered
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.blocks.hgvt_block import (
    HgVTBlock,
    mean_squared_cosine,
    population_loss,
    shared_edge,
)
from vitkit.models.parts.mixers.hyper_pool import Membership
from vitkit.models.vit import ViT, collect_aux

COUNTS = {"vertices": 3, "edges": 4, "virtual_edges": 2, "features": 8}
LAYOUT = TokenLayout(grid=(3, 5), prefix=(("class", 1),))


def block(**options) -> HgVTBlock:
    torch.manual_seed(0)
    return HgVTBlock(16, 4, 32, **{**COUNTS, **options}).eval()


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(seed))


def host(**options) -> ViT:
    torch.manual_seed(0)
    return ViT(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=4, num_classes=3, **options).eval()


def test_the_first_block_brings_named_prefix_groups():
    x, layout = block()(tokens(), LAYOUT)
    assert layout.prefix == (("class", 1), ("virtual", 3), ("edge", 4), ("virtual_edge", 2))
    assert x.shape == (2, 25, 16)
    x, after = block(depth=1)(x, layout)
    assert after.prefix == layout.prefix and x.shape == (2, 25, 16)


def test_a_later_block_alone_says_where_the_hyperedges_come_from():
    model = host()
    vitkit.swap(model, "block", "hgvt-block", where="last:2", **COUNTS)
    with pytest.raises(BadInput, match="Block 1 found no hyperedges"):
        model(torch.randn(1, 3, 16, 16))
    model = host()
    vitkit.swap(model, "block", "hgvt-block", where="last:2", first=1, **COUNTS)
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 3)
    assert model.blocks[1].states is not None and model.blocks[2].states is None


def test_patches_and_virtual_hyperedges_are_never_linked():
    made = block()
    x, layout = made._begin(tokens(), LAYOUT)
    links = made.membership(x, layout)
    vertices, edges = made.split(x, layout)
    assert vertices.shape == (2, 1 + 3 + 15, 16) and edges.shape == (2, 6, 16)
    image = torch.tensor([True] + [False] * 3 + [True] * 15)
    assert bool((links.soft[:, image, 4:] == 0).all()) and not links.hard[:, image, 4:].any()
    assert bool((links.soft[:, ~image] > 0).all()) and bool((links.soft[:, :, :4] > 0).all())


def test_vertices_see_each_other_through_a_common_hyperedge_only():
    hard = torch.zeros(1, 4, 2, dtype=torch.bool)
    hard[0, [0, 1], 0] = True
    hard[0, 2, 1] = True
    assert shared_edge(hard)[0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_with_everybody_in_every_open_hyperedge_vertices_attend_to_all(monkeypatch):
    made = block()
    x, layout = made._begin(tokens(), LAYOUT)
    vertices, _ = made.split(x, layout)
    normed = made.vertex_norms[0](vertices)
    original = made.adjacency.forward

    def everybody(v, e, allowed=None):
        links = original(v, e, allowed)
        return links._replace(hard=torch.ones_like(links.hard) & allowed)

    monkeypatch.setattr(made.adjacency, "forward", everybody)
    links = made.membership(x, layout)
    with torch.no_grad():
        masked = made.between(normed, normed, None, shared_edge(links.hard).unsqueeze(1))
        assert torch.allclose(masked, made.between(normed, normed), atol=1e-6)


def test_the_unlinked_keep_their_state_up_to_the_mlp(monkeypatch):
    made = block()
    x = tokens().requires_grad_()
    original = made.adjacency.forward

    def lonely(v, e, allowed=None):
        hard = original(v, e, allowed).hard.clone()
        hard[:, :, 1] = False
        hard[:, 5] = False
        return original(v, e, allowed)._replace(hard=hard)

    monkeypatch.setattr(made.adjacency, "forward", lonely)
    made.edge_mlp, made.vertex_mlp = torch.nn.Identity(), torch.nn.Identity()
    made.edge_norms[2] = torch.nn.Identity()
    made.vertex_norms[2] = torch.nn.Identity()
    out, layout = made(x, LAYOUT)
    edges = out[:, layout.prefix_slice("edge")]
    # an identity in place of norm and MLP doubles the state
    assert torch.allclose(edges[:, 1], 2 * made.states[:, 3 + 1].expand(2, -1))
    assert not torch.allclose(edges[:, 0], 2 * made.states[:, 3 + 0].expand(2, -1))
    out.square().sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in made.parameters() if p.grad is not None)


def test_patches_may_be_permuted():
    made, x = block(), tokens()
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + scattered(15, 15, torch.device("cpu"))[0, 0]])
    with torch.no_grad():
        straight, layout = made(x, LAYOUT)
        permuted, _ = made(x[:, order], LAYOUT)
    num_prefix = layout.num_prefix
    assert torch.allclose(permuted[:, :num_prefix], straight[:, :num_prefix], atol=1e-5)
    assert torch.allclose(permuted[:, num_prefix:], straight[:, num_prefix:][:, order[1:] - 1], atol=1e-5)


def test_padding_is_no_vertex_and_a_merged_token_counts_for_its_patches():
    made, x = block(), tokens()
    padded = torch.cat([x, 9 * torch.randn(2, 4, 16)], 1)
    doubled, sizes = torch.cat([x, x[:, 4:5]], 1), torch.ones(2, 15)
    sizes[:, 3] = 2
    with torch.no_grad():
        plain, _ = made(x, LAYOUT)
        out, _ = made(padded, LAYOUT.replace(valid=(torch.arange(19) < 15).expand(2, -1)))
        assert torch.allclose(out[:, :25], plain, atol=1e-5) and bool(torch.isfinite(out).all())
        merged, _ = made(x, LAYOUT.replace(sizes=sizes))
        assert torch.allclose(merged, made(doubled, LAYOUT)[0][:, :25], atol=1e-5)


def test_diversity_is_zero_for_orthogonal_and_one_for_identical_tokens():
    assert mean_squared_cosine(3 * torch.eye(4)[None]).item() == pytest.approx(0, abs=1e-7)
    assert mean_squared_cosine(torch.ones(2, 5, 3)).item() == pytest.approx(1)
    tokens = torch.randn(2, 4, 3)
    pairs = [torch.cosine_similarity(t[i], t[j], 0) ** 2 for t in tokens for i in range(4) for j in range(4) if i != j]
    assert mean_squared_cosine(tokens).item() == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert mean_squared_cosine(torch.ones(2, 1, 3)).item() == 0


def test_population_is_free_between_its_bounds_and_quadratic_outside():
    def loss(share: float, allowed=None) -> float:
        log = torch.full((2, 6, 3), share).log()
        return population_loss(Membership(log, log > 0, allowed)).item()

    assert loss(0.05) == pytest.approx(0, abs=1e-12) and loss(0.3) == 0 and loss(0.5) == pytest.approx(0, abs=1e-12)
    assert loss(0.9) == pytest.approx(0.16, abs=1e-6) and loss(0.01) == pytest.approx(0.0016, abs=1e-6)
    half = torch.zeros(6, 3, dtype=torch.bool)
    half[:3] = True
    assert loss(0.3, half) == 0, "only vertices the hyperedge may hold are counted"


def test_losses_come_from_training_forwards_and_can_be_left_out():
    model = host()
    vitkit.swap(model, "block", "hgvt-block", **COUNTS)
    images = torch.randn(2, 3, 16, 16)
    with collect_aux(model) as aux:
        model(images)
    assert not aux
    model.train()
    with collect_aux(model) as aux:
        model(images)
    assert set(aux) == {(name, depth) for name in ("diversity", "population") for depth in range(3)}
    model = host()
    vitkit.swap(model, "block", "hgvt-block", population=0.0, **COUNTS)
    with collect_aux(model.train()) as aux:
        model(images)
    assert {name for name, _ in aux} == {"diversity"}


def test_impossible_counts_are_refused():
    with pytest.raises(BadInput, match="at least one edge"):
        block(edges=0)
    with pytest.raises(BadInput, match="virtual edges need virtual vertices"):
        block(vertices=0)
    out, layout = block(vertices=0, virtual_edges=0).train()(tokens(), LAYOUT)
    assert out.shape == (2, 20, 16) and bool(torch.isfinite(layout.aux["diversity", 0]))
