"""Dense graph operations against slow loops, scikit-learn and their own symmetries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.models import graph
from vitkit.models.graph import (
    cluster_knn,
    gather_rows,
    incidence,
    kmeans,
    knn,
    max_relative,
    normalised_incidence,
    scattered,
    unit,
)


def features(batch: int = 2, nodes: int = 13, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, nodes, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_neighbours(x: torch.Tensor, candidates: list[int], i: int, k: int) -> set[int]:
    directions = x / x.norm(dim=-1, keepdim=True)
    ranked = sorted(candidates, key=lambda j: (j != i, -float(directions[i] @ directions[j])))
    return set(ranked[:k])


def test_rows_are_gathered_image_by_image():
    x, index = features(), torch.tensor([[[0, 12], [3, 3]], [[1, 0], [7, 5]]])
    got = gather_rows(x, index)
    assert got.shape == (2, 2, 2, 5)
    for b in range(2):
        assert torch.equal(got[b], x[b][index[b]])


@pytest.mark.parametrize("k", [1, 4, 13, 20])
def test_knn_equals_a_loop_and_has_the_node_itself_first(k):
    x = features()
    got = knn(x, k)
    assert got.shape == (2, 13, min(k, 13))
    assert bool((got[..., 0] == torch.arange(13)).all())
    for b in range(2):
        for i in range(13):
            assert set(got[b, i].tolist()) == slow_neighbours(x[b], list(range(13)), i, k)


def test_padding_is_nobodys_neighbour():
    x, valid = features(), torch.arange(13).expand(2, -1) < torch.tensor([[9], [3]])
    got = knn(x, 5, valid)
    for b, real in enumerate((9, 3)):
        for i in range(real):
            assert set(got[b, i].tolist()) == slow_neighbours(x[b], list(range(real)), i, 5)
    assert bool((got[1, 0] == 0).sum() == 3), "three nodes are fewer than five neighbours: the rest is the node itself"


@given(
    sizes=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    other=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    k=st.integers(1, 12),
    classes=st.sampled_from([1, 2, 8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_neighbours_within_clusters_equal_a_loop(sizes, other, k, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    nodes = max(sum(sizes), sum(other), 1)
    rows = [[c for c, size in enumerate(one) for _ in range(size)] for one in (sizes, other)]
    rows = [one + [-1] * (nodes - len(one)) for one in rows]
    labels = torch.tensor([[row[i] for i in torch.randperm(nodes, generator=generator)] for row in rows])
    x = features(2, nodes, 4, seed)
    with pytest.MonkeyPatch.context() as patch:
        # one class pads every cluster to the largest, eight pad none of these six
        patch.setattr(graph, "SIZE_CLASSES", classes)
        got = cluster_knn(x, labels, 3, k)
    assert got.shape == (2, nodes, max(1, min(k, *[max(sizes + other)])))
    for b in range(2):
        for i in range(nodes):
            label = int(labels[b, i])
            mine = [j for j in range(nodes) if int(labels[b, j]) == label] if label >= 0 else [i]
            assert set(got[b, i].tolist()) == slow_neighbours(x[b], mine, i, k)


def test_equal_features_do_not_push_the_node_out():
    x = torch.ones(1, 20, 3)
    assert bool((knn(x, 3)[..., 0] == torch.arange(20)).all())
    assert bool((cluster_knn(x, torch.arange(20).reshape(1, -1) % 2, 2, 3)[..., 0] == torch.arange(20)).all())


def test_max_relative_equals_its_definition():
    x, index = features(), knn(features(), 4)
    want = (gather_rows(x, index) - x.unsqueeze(2)).amax(2)
    assert torch.allclose(max_relative(x, index), want)
    low = max_relative(x.to(torch.bfloat16), index)
    assert low.dtype == torch.bfloat16 and torch.allclose(low.double(), want, atol=0.05)


def test_max_relative_can_be_differentiated_twice():
    x, index = features(1, 5, 2).requires_grad_(), knn(features(1, 5, 2), 3)

    def curved(x: torch.Tensor) -> torch.Tensor:
        return max_relative(x, index).pow(3)

    assert torch.autograd.gradcheck(curved, x)
    assert torch.autograd.gradgradcheck(curved, x)


def test_incidence_and_its_normalisation():
    members = torch.tensor([[[0, 1], [1, 2]]])
    h = incidence(members, 4)
    assert h[0].tolist() == [[1, 0], [1, 1], [0, 1], [0, 0]]
    node, edge = torch.tensor([1.0, 2, 1, 0]), torch.tensor([2.0, 2])
    degrees = (node.clamp(min=1).rsqrt().diag() @ h[0]) @ edge.rsqrt().diag()
    assert torch.allclose(normalised_incidence(h)[0], degrees)
    assert incidence(members, 4, torch.tensor([[True, False, True, True]]))[0, 1].tolist() == [0, 0]


# -- k-means ---------------------------------------------------------------------------------------------------------


def test_kmeans_equals_scikit_learn_from_the_same_centres():
    from sklearn.cluster import KMeans

    x = features(3, 60, 4)
    first = features(3, 4, 4, seed=5).unsqueeze(1)
    labels, centres = kmeans(x, 4, first, steps=200, tol=0.0)
    for b in range(3):
        theirs = KMeans(4, init=first[b, 0].numpy(), n_init=1, tol=0.0, max_iter=200).fit(unit(x)[b].numpy())
        # a centre without members stays here and moves there
        if len(set(labels[b].tolist())) == 4:
            assert labels[b].tolist() == theirs.labels_.tolist()
            assert torch.allclose(centres[b], torch.from_numpy(theirs.cluster_centers_))


def test_labels_are_the_nearest_centres_and_centres_the_means():
    x = features(2, 40, 3)
    labels, centres = kmeans(x, 5, steps=100, tol=0.0)
    distance = torch.cdist(unit(x), centres)
    assert torch.equal(distance.argmin(-1), labels)
    for b in range(2):
        for c in set(labels[b].tolist()):
            assert torch.allclose(centres[b, c], unit(x)[b][labels[b] == c].mean(0))


def test_the_better_restart_is_taken():
    x = features(4, 30, 3)
    starts = features(4, 6, 3, seed=3).reshape(4, 2, 3, 3)

    def spread(labels: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        return (unit(x) - gather_rows(centres, labels)).square().sum((1, 2))

    both = spread(*kmeans(x, 3, starts))
    single = torch.stack([spread(*kmeans(x, 3, starts[:, r : r + 1])) for r in range(2)])
    assert torch.allclose(both, single.amin(0)) and bool((single[0] != single[1]).any())


def test_an_empty_cluster_keeps_its_centre():
    x = features(1, 10, 3)
    far = -10 * unit(x).mean(1, keepdim=True)
    first = torch.cat([x[:, :2], far], 1).unsqueeze(1)
    labels, centres = kmeans(x, 3, first)
    assert 2 not in labels.tolist()[0]
    assert torch.equal(centres[0, 2], far[0, 0])


def test_an_image_alone_in_a_batch_and_padded_gets_the_same_clusters():
    x = features(9, 24, 6)
    labels, centres = kmeans(x, 4)
    for b in (0, 3, 8):
        alone = kmeans(x[b : b + 1], 4)
        assert torch.equal(alone[0][0], labels[b]) and torch.allclose(alone[1][0], centres[b])
    padded = torch.cat([x, 100 * features(9, 7, 6, seed=8)], 1)
    valid = (torch.arange(31) < 24).expand(9, -1)
    again, _ = kmeans(padded, 4, valid=valid)
    assert torch.equal(again[:, :24], labels) and bool((again[:, 24:] == -1).all())


def test_compiled_kmeans_takes_no_early_end_and_gives_the_same():
    x = features(3, 20, 4)
    with torch.no_grad():
        compiled = torch.compile(lambda x: kmeans(x, 3, steps=6), backend="eager", fullgraph=True)(x)
    labels, centres = kmeans(x, 3, steps=6)
    assert torch.equal(compiled[0], labels) and torch.allclose(compiled[1], centres)


def test_scattered_nodes_differ_and_repeat_only_without_shuffling():
    first = scattered(5, 12, torch.device("cpu"), rows=3)
    assert first.shape == (1, 3, 5) and all(len(set(row)) == 5 for row in first[0].tolist())
    assert len({tuple(row) for row in first[0].tolist()}) == 3
    assert torch.equal(first, scattered(5, 12, torch.device("cpu"), rows=3))
    drawn = {tuple(scattered(5, 12, torch.device("cpu"), shuffle=True)[0, 0].tolist()) for _ in range(5)}
    assert len(drawn) > 1
