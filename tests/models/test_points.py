"""Centres, neighbours, tokens of clouds, and images as clouds."""

from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.points import (
    MiniPointNet,
    PointTokenizer,
    farthest_points,
    nearest_points,
    points_from_images,
    sorted_points,
)


def clouds(batch=3, n=50, seed=0):
    return torch.randn(batch, n, 3, generator=torch.Generator().manual_seed(seed))


def test_sorting_is_lexicographic():
    cloud = torch.randint(0, 3, (2, 40, 3), generator=torch.Generator().manual_seed(1)).float()
    for rows, order in zip(cloud.tolist(), sorted_points(cloud).tolist()):
        assert order == sorted(range(40), key=lambda i: (*rows[i], i))


def test_farthest_points_are_a_loop_over_distances():
    for cloud, found in zip(clouds().double(), farthest_points(clouds().double(), 12)):
        chosen = [int((cloud - cloud.mean(0)).norm(dim=1).argmax())]
        while len(chosen) < 12:
            gaps = [min(float((p - cloud[c]).norm()) for c in chosen) for p in cloud]
            chosen.append(max(range(50), key=gaps.__getitem__))
        assert found.tolist() == chosen


def test_all_points_can_be_centres_and_equal_points_are_no_trouble():
    assert sorted(farthest_points(clouds(1, 9), 9)[0].tolist()) == list(range(9))
    assert farthest_points(torch.ones(1, 4, 3), 3).tolist() == [[0, 0, 0]]
    with pytest.raises(BadInput, match="count=5"):
        farthest_points(torch.ones(1, 4, 3), 5)


def test_nearest_points_are_a_sort_of_distances():
    # whole numbers: many points are equally far
    cloud = torch.randint(0, 4, (2, 60, 3), generator=torch.Generator().manual_seed(2)).float()
    centres = cloud[:, ::7]
    found = nearest_points(centres, cloud, 11)
    for b in range(2):
        for g, centre in enumerate(centres[b]):
            gaps = (cloud[b] - centre).square().sum(1).tolist()
            assert found[b, g].tolist() == sorted(range(60), key=lambda i: (gaps[i], i))[:11]
    with pytest.raises(BadInput, match="k=61"):
        nearest_points(centres, cloud, 61)


def test_a_group_is_a_set():
    net = MiniPointNet(8, 4).eval()
    groups = clouds(5, 12).unflatten(0, (5, 1))
    assert net(groups).shape == (5, 1, 8)
    assert torch.allclose(net(groups), net(groups[:, :, torch.randperm(12)]), atol=1e-6)
    # the maximum over points: doubling one changes nothing
    assert torch.allclose(net(groups), net(torch.cat([groups, groups[:, :, :3]], 2)), atol=1e-6)


def test_the_order_of_the_points_does_not_matter_to_the_bit():
    net = PointTokenizer(8, 10, 6, 4, 4).eval()
    # on a lattice, where farthest and nearest points are seldom unique
    for cloud in (clouds(), torch.randint(0, 3, (3, 50, 3), generator=torch.Generator().manual_seed(3)).float()):
        mixed = cloud[:, torch.randperm(50, generator=torch.Generator().manual_seed(4))]
        assert all(torch.equal(a, b) for a, b in zip(net(cloud), net(mixed)))
        assert all(torch.allclose(a[1:2], b, atol=1e-6) for a, b in zip(net(cloud), net(cloud[1:2])))


def test_groups_are_seen_from_their_centre():
    net = PointTokenizer(8, 10, 6, 4, 4).eval()
    here, there = net(clouds()), net(clouds() + 8)
    # the density is that of the other groups of the cloud: neither place nor scale change it
    assert torch.allclose(here.x, there.x, atol=1e-4) and torch.allclose(here.centres + 8, there.centres, atol=1e-5)
    assert torch.allclose(here.density, net(5 * clouds()).density, atol=1e-4)
    dense = torch.cat([clouds(1, 30) * 0.05, clouds(1, 30) + 5], 1)
    found = net(dense)
    near = found.centres.norm(dim=2) < 1
    assert float(found.density[near].min()) > float(found.density[~near].max())


def test_small_clouds_have_a_token_a_point():
    found = PointTokenizer(8, 64, 32)(clouds(2, 5))
    assert found.x.shape == (2, 5, 8) and found.density.shape == (2, 5)
    with pytest.raises(BadInput, match="2×5×4"):
        PointTokenizer(8)(torch.zeros(2, 5, 4))
    with pytest.raises(BadInput, match="groups=0"):
        PointTokenizer(8, 0)


def test_gradients_reach_the_coordinates():
    points = clouds(2, 30).double().requires_grad_()
    net = PointTokenizer(4, 5, 4, 4, 4).double().eval()

    def value(cloud):
        found = net(cloud)
        return found.x.sum() + found.density.square().sum() + found.position.sum()

    value(points).backward()
    assert bool(points.grad.isfinite().all()) and float(points.grad.abs().sum()) > 0
    step = torch.zeros_like(points)
    step[0, 3, 1] = 1e-6
    slope = (value(points.detach() + step) - value(points.detach() - step)) / 2e-6
    assert torch.allclose(slope, points.grad[0, 3, 1], atol=1e-5)
    # a group of equal points has no density to speak of, and no NaN
    same = torch.zeros(1, 8, 3, requires_grad=True)
    PointTokenizer(4, 3, 3, 4, 4)(same).density.sum().backward()
    assert bool(same.grad.isfinite().all())


def test_images_become_their_pixels():
    image = torch.rand(1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    points = points_from_images(image, 99, relief=0.5)
    assert points.shape == (1, 15, 3)
    expected = {
        (round((c + 0.5 - 2.5) / 2.5, 4), round((r + 0.5 - 1.5) / 2.5, 4)): float(image[0, :, r, c].mean() / 2)
        for r in range(3)
        for c in range(5)
    }
    for x, y, z in points[0].tolist():
        assert z == pytest.approx(expected.pop((round(x, 4), round(y, 4))), abs=1e-6)


def test_what_stands_out_is_taken():
    image = torch.zeros(2, 1, 12, 12)
    image[0, 0, 3:6, 4:8] = 1
    image[1, 0, 8:10, 8:10] = -1
    points = points_from_images(image, 12)
    bright = points[0][points[0, :, 2] > 0]
    assert len(bright) == 12 and len(points[1][points[1, :, 2] < 0]) == 4
    assert torch.equal(points[1:], points_from_images(image[1:], 12))
    # an inverted picture has the same points at the other height
    other = points_from_images(1 - image, 12)
    assert torch.equal(other[..., :2], points[..., :2])
    image.requires_grad_()
    points_from_images(image, 12)[..., 2].sum().backward()
    assert float(image.grad.sum()) == 12
    with pytest.raises(BadInput, match="num_points=0"):
        points_from_images(image, 0)
