"""DEGC: its graph stays inside clusters, and its update is what the equations say."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import vitkit
from vitkit.errors import BadInput, UnknownName
from vitkit.models.graph import kmeans
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.degc import CONVS, DEGC, CentroidAttention, neighbours_at
from vitkit.models.vit import ViT
from vitkit.testing import PLACES, check_part


def part(**options) -> DEGC:
    torch.manual_seed(0)
    made = DEGC(8, **{"clusters": 3, "k": 4, **options})
    for norm in (m for m in made.modules() if isinstance(m, torch.nn.BatchNorm1d)):
        torch.nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    return made.eval()


def patches(nodes: int = 30, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, nodes, 8, generator=torch.Generator().manual_seed(seed))


def batch_norm(norm: torch.nn.BatchNorm1d, row: torch.Tensor) -> torch.Tensor:
    return (row - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias


def brute_force(mixer: DEGC, x: torch.Tensor) -> torch.Tensor:
    """Node by node, with labels and neighbours as given."""
    h = batch_norm(mixer.norm1, x @ mixer.fc1.weight.T)
    labels, neighbours = mixer.graph(h)
    out = torch.zeros_like(x)
    for b in range(len(x)):
        groups = [h[b][labels[b] == c] for c in range(mixer.clusters)]
        centres = torch.stack([g.mean(0) if len(g) else torch.zeros(8) for g in groups])
        new = torch.zeros_like(centres)
        if mixer.between is not None:
            gat = mixer.between
            for i in range(len(groups)):
                logits = torch.stack(
                    [
                        gat.score(F.leaky_relu(gat.source(centres[j]) + gat.target(centres[i]), 0.2))[0]
                        for j in range(len(groups))
                    ]
                )
                logits[torch.tensor([len(g) == 0 for g in groups])] = -torch.inf
                new[i] = logits.softmax(0) @ gat.source(centres)
        for i in range(x.shape[1]):
            near = [h[b, j] for j in set(neighbours[b, i].tolist())]
            centroid = [new[labels[b, i]]] if mixer.between is not None else []
            if mixer.conv == "edge":
                each = [
                    F.gelu(batch_norm(mixer.vertex_norm, mixer.vertex(torch.cat([h[b, i], n - h[b, i], *centroid]))))
                    for n in near
                ]
                u = torch.stack(each).amax(0)
            else:
                if mixer.conv == "mr":
                    relative = torch.stack([n - h[b, i] for n in near]).amax(0)
                    found = torch.stack([h[b, i], relative], 1).flatten()
                elif mixer.conv == "sage":
                    said = [F.gelu(batch_norm(mixer.message_norm, mixer.message(n))) for n in near]
                    found = torch.cat([h[b, i], torch.stack(said).amax(0)])
                else:
                    found = mixer.epsilon * h[b, i] + torch.stack(near).sum(0)  # i is among its own neighbours
                u = F.gelu(batch_norm(mixer.vertex_norm, mixer.vertex(torch.cat([found, *centroid]))))
            out[b, i] = batch_norm(mixer.norm2, u @ mixer.fc2.weight.T)
    return out


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("options", [{}, {"clusters": 1, "centroids": False}, {"clusters": 12}])
def test_equals_a_loop_over_nodes(conv, options):
    mixer = part(conv=conv, **options)
    if conv == "gin":
        torch.nn.init.constant_(mixer.epsilon, 0.3)
    with torch.no_grad():
        x = patches()
        assert torch.allclose(mixer.convolve(x), brute_force(mixer, x), atol=1e-5)


def test_edges_cross_neither_clusters_nor_images():
    mixer, x = part(), patches(batch=3)
    labels, neighbours = mixer.graph(x)
    assert labels.unique().tolist() == [0, 1, 2]
    assert bool((labels.gather(1, neighbours.flatten(1)).reshape(neighbours.shape) == labels.unsqueeze(2)).all())
    x.requires_grad_()
    mixer.convolve(x)[1].sum().backward()
    assert bool((x.grad[[0, 2]] == 0).all()) and bool((x.grad[1] != 0).any())


def test_only_centroids_carry_anything_across_clusters():
    for centroids in (False, True):
        mixer = part(centroids=centroids)
        x = patches(batch=1).requires_grad_()
        h = mixer.norm1(mixer.fc1(x))
        labels, _ = mixer.graph(h)
        mixer.convolve(x)[0, labels[0] == 0].square().sum().backward()
        others = x.grad[0, labels[0] != 0]
        assert bool((others != 0).any()) == centroids


def test_permuting_nodes_permutes_the_update_given_the_same_first_centres():
    mixer, x = part(), patches()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        h = mixer.norm1(mixer.fc1(x))
        first = h[:, :6].reshape(2, 2, 3, 8)
        straight = mixer.convolve(x, initial=first)
        assert torch.allclose(mixer.convolve(x[:, order], initial=first), straight[:, order], atol=1e-5)


def test_the_graph_has_no_gradient_but_features_and_centroids_do():
    mixer = part().train()
    x = patches().requires_grad_()
    labels, neighbours = mixer.graph(x)
    assert not labels.is_floating_point() and not neighbours.is_floating_point()
    assert not kmeans(x, 3)[1].requires_grad
    mixer.convolve(x).square().sum().backward()
    assert bool((x.grad != 0).any())
    assert all(bool((p.grad != 0).any()) for p in mixer.between.parameters())


def test_evaluation_repeats_itself_and_training_draws_anew():
    mixer = part()
    x = patches(60)
    with torch.no_grad():
        assert torch.equal(mixer.convolve(x), mixer.convolve(x))
        mixer.train()
        torch.manual_seed(0)
        drawn = [mixer.graph(x)[0] for _ in range(4)]
        assert any(not torch.equal(drawn[0], other) for other in drawn[1:])


def test_padding_changes_nothing_for_real_patches():
    mixer, x = part(), patches()
    padded = torch.cat([x, 50 * patches(7, seed=3)], 1)
    layout = TokenLayout(grid=(5, 6), valid=(torch.arange(37) < 30).expand(2, -1))
    with torch.no_grad():
        assert torch.allclose(mixer(padded, layout)[:, :30], mixer.convolve(x), atol=1e-5)
        mixer.train()
        torch.manual_seed(0)
        mixer.convolve(x)
        plain = mixer.norm2.running_mean.clone()
        again = part().train()
        torch.manual_seed(0)
        again(padded, layout)
    # the draws of k-means differ with the padding, the statistics of the first norm do not
    assert torch.allclose(mixer.norm1.running_mean, again.norm1.running_mean, atol=1e-6)
    assert plain.isfinite().all() and again.norm2.running_mean.isfinite().all()


def test_prefix_tokens_attend_to_everything_as_before():
    torch.manual_seed(0)
    host = ViT(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3, reg_tokens=2).eval()
    x = torch.randn(2, 19, 16)
    layout = TokenLayout(grid=(4, 4), prefix=(("class", 1), ("register", 2)))
    with torch.no_grad():
        before = host.blocks[0].attn(x, layout)
        vitkit.swap(host, "mixer", "degc")
        after = host.blocks[0].attn(x, layout)
    assert torch.allclose(before[:, :3], after[:, :3], atol=1e-6)
    with pytest.raises(BadInput, match="built for tokens without prefix"):
        part()(torch.randn(1, 17, 8), TokenLayout(grid=(4, 4), prefix=(("class", 1),)))


def test_an_absent_centroid_is_nobodys_neighbour():
    torch.manual_seed(0)
    attention, c = CentroidAttention(4), torch.randn(1, 3, 4)
    present = torch.tensor([[True, False, True]])
    with torch.no_grad():
        moved = c.clone()
        moved[0, 1] += 5
        assert torch.allclose(attention(c, present)[:, [0, 2]], attention(moved, present)[:, [0, 2]])
        assert torch.allclose(attention(c[:, [0, 2]], present[:, [0, 2]]), attention(c, present)[:, [0, 2]], atol=1e-6)


def test_neighbours_grow_linearly_over_depth():
    assert [neighbours_at(i, 12, 9) for i in (0, 11)] == [9, 18] and neighbours_at(0, 1, 9) == 9
    host = ViT(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2)
    vitkit.swap(host, "mixer", "degc", k=4)
    assert [block.attn.k for block in host.blocks] == [4, 6, 8]


@pytest.mark.parametrize("conv", ["edge", "sage", "gin"])
def test_other_convolutions_conform(conv):
    assert "gradients" in check_part(DEGC, places=PLACES[2:3], conv=conv).passed


def test_bad_options_are_refused():
    with pytest.raises(BadInput, match="at least 1"):
        part(clusters=0)
    with pytest.raises(UnknownName, match="graph convolution"):
        part(conv="gcn")
