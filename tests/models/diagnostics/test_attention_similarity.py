"""The attention-learning score: itself, uniform attention, merged tokens, refusals."""

from __future__ import annotations

import pytest
import torch

from vitkit.anatomy import Trace
from vitkit.compress.merge.tome import tome
from vitkit.errors import BadInput
from vitkit.models.diagnostics.attention_similarity import attention_similarity
from vitkit.models.normalized import NormalizedModel
from vitkit.testing.worlds import tiny_vit


def model(seed=0, **options):
    net = tiny_vit(16, 4, 1, depth=2, seed=seed, **options).eval()
    # sharper than at the start, so that maps differ
    for block in net.blocks:
        block.attn.qkv.weight.data.mul_(3)
    return net


def images(n=6):
    return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(2))


def test_a_model_is_like_itself():
    net = model()
    found = attention_similarity(net, net, images())
    assert found.cosine == pytest.approx(1, abs=1e-9) and found.centred == pytest.approx(1, abs=1e-9)
    for row in found.rows:
        assert row.entropy == row.reference_entropy and row.distance == row.reference_distance


def test_figures_by_a_loop():
    net, other = model(), model(1)
    found = attention_similarity(net, other, images())
    weights = []
    for m in (net, other):
        with Trace(m, "blocks.1.attn.weights") as trace:
            m(images())
        weights.append(trace["blocks.1.attn.weights"].double())
    cosines, centred = [], []
    for a, b in zip(*(w.mean(1)[:, 0, 1:] for w in weights)):
        cosines.append(float(a @ b / a.norm() / b.norm()))
        a, b = a - a.mean(), b - b.mean()
        centred.append(float(a @ b / a.norm() / b.norm()))
    row = found.rows[1]
    assert row.cosine == pytest.approx(sum(cosines) / 6) and row.centred == pytest.approx(sum(centred) / 6)
    assert row.centred < 0.9 * row.cosine
    entropy = -(weights[0] * weights[0].log()).sum(-1).mean() / torch.tensor(17.0).log()
    assert row.entropy == pytest.approx(float(entropy), rel=1e-5)
    places = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double()
    total = 0.0
    for w in weights[0].flatten(0, 1)[:, 1:, 1:]:
        w = w / w.sum(-1, keepdim=True)
        for i in range(16):
            total += float((w[i] * (places[i] - places).norm(dim=1)).sum()) / 16
    assert row.distance == pytest.approx(total / 24 / (4 * 2**0.5), rel=1e-5)


def test_even_attention_has_entropy_one_and_no_centred_likeness():
    even = model()
    for block in even.blocks:
        block.attn.qkv.weight.data[:128] = 0
        block.attn.qkv.bias.data[:128] = 0
    found = attention_similarity(even, model(), images())
    assert all(row.entropy == pytest.approx(1, abs=1e-6) for row in found.rows)
    assert abs(found.centred) < 0.05 < found.cosine


def test_depths_hosts_and_wrappers_may_differ():
    deep = NormalizedModel(tiny_vit(16, 4, 1, depth=4, class_token=False, global_pool="avg").eval(), [0.5], [0.25])
    found = attention_similarity(deep, model(), images())
    assert [row.reference_depth for row in found.rows] == [0, 0, 1, 1]
    deep.train()
    attention_similarity(deep, model(), images())
    assert deep.training


def test_merged_tokens_share_their_attention():
    merged, _ = tome(model(), images(), r=2)
    with Trace(merged, "blocks.1.attn.weights") as trace:
        merged(images())
    layout = trace.layouts["blocks.1.attn.weights"]
    assert layout.sizes.shape == (6, 14)
    query = trace["blocks.1.attn.weights"].double().mean(1)[:, 0, 1:]
    spread = torch.stack([(row / size)[source] for row, size, source in zip(query, layout.sizes, layout.source)])
    other = model()
    with Trace(other, "blocks.1.attn.weights") as trace:
        other(images())
    plain = trace["blocks.1.attn.weights"].double().mean(1)[:, 0, 1:]
    expected = torch.nn.functional.cosine_similarity(spread, plain, dim=1).mean()
    assert attention_similarity(merged, other, images()).rows[1].cosine == pytest.approx(float(expected), rel=1e-6)


def test_another_grid_is_refused():
    with pytest.raises(BadInput, match=r"\(4, 4\), the reference on \(8, 8\)"):
        attention_similarity(model(), tiny_vit(16, 2, 1, depth=2), images())
