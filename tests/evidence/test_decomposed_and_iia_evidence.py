"""What the experiments on DCFormer and iiANET draw and build."""

from __future__ import annotations

import torch
from torch import nn

from vitkit.evidence import dcformer, iianet


def test_markers_are_of_the_same_kind_where_the_label_says_so():
    images, labels = iianet.far_pairs(200, seed=0)
    left, right = images[:, 0, :, :3] > 0.5, images[:, 0, :, -3:] > 0.5
    assert not bool((images[:, 0, :, 3:-3] > 0.5).any())
    # both kinds have five cells, one of them has its corners
    same = left.sum((1, 2)) == 5
    assert bool(same.all()) and bool((right.sum((1, 2)) == 5).all())
    wide = left.any(2).int().argmax(1)
    corner = left[torch.arange(200), wide, 0]
    other = right[torch.arange(200), right.any(2).int().argmax(1), 0]
    assert torch.equal((corner == other).long(), labels) and 0.4 < labels.double().mean() < 0.6


def test_shapes_fill_about_as_many_cells_but_stretch_differently():
    volumes, labels = dcformer.shapes(150, seed=1)
    solid = (volumes > 0.5).flatten(1).sum(1).double()
    means = torch.stack([solid[labels == k].mean() for k in range(3)])
    assert means.max() / means.min() < 1.2
    again, _ = dcformer.shapes(150, seed=1)
    assert torch.equal(again, volumes)


def test_arms_differ_in_their_convolutions_only():
    plain, full = dcformer._network(0), dcformer._network(0, full=True)
    kernels = [m.kernel_size for m in full.modules() if isinstance(m, nn.Conv3d)]
    assert kernels == [(7, 7, 7)] + [(3, 3, 3)] * 3 + [(1, 1, 1), (7, 7, 7), (1, 1, 1), (5, 5, 5), (1, 1, 1), (3, 3, 3)]
    volumes = torch.randn(2, 1, 20, 20, 20)
    assert plain(volumes).shape == full(volumes).shape == dcformer._vit(0)(volumes).shape == (2, 3)
    counts = [sum(p.numel() for p in m.parameters()) for m in (plain, dcformer._vit(0))]
    assert abs(counts[0] - counts[1]) < 0.1 * counts[0]


def test_the_three_splits_have_about_as_many_parameters():
    images = torch.rand(4, 3, 32, 32)
    task = iianet.Task(images, torch.zeros(4).long(), images, torch.zeros(4).long(), 10, 1)
    counts = [sum(p.numel() for p in iianet._network(arm, task, 0).parameters()) for arm in iianet.ARMS]
    assert max(counts) < 1.1 * min(counts)
