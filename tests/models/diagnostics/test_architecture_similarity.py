from __future__ import annotations

from functools import cache

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vitkit
from vitkit.models.diagnostics.architecture_similarity import architecture_similarity, layer_tokens, select_diverse

WORDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=6)


def by_recursion(a, b, edge, match=1, mismatch=-1, gap=-1):
    """Every alignment, written out: (score, equal pairs, −length) of the best."""

    @cache
    def best(i, j):
        if i == 0 or j == 0:
            return (edge * (i + j), 0, -(i + j))
        same = a[i - 1] == b[j - 1]
        steps = [(best(i - 1, j - 1), match if same else mismatch, int(same)), (best(i - 1, j), gap, 0)]
        steps.append((best(i, j - 1), gap, 0))
        return max((s + add, pairs + more, length - 1) for (s, pairs, length), add, more in steps)

    _, pairs, length = best(len(a), len(b))
    return pairs / -length


@settings(max_examples=60, deadline=None)
@given(a=WORDS, b=WORDS, borders=st.sampled_from(["zero", "linear"]))
def test_equals_all_alignments_and_is_symmetric(a, b, borders):
    index = architecture_similarity(a, b, borders=borders)
    assert index == pytest.approx(by_recursion(tuple(a), tuple(b), 0 if borders == "zero" else -1))
    assert index == architecture_similarity(b, a, borders=borders)
    assert 0 <= index <= 1
    assert architecture_similarity(a, a, borders=borders) == 1


def test_golden_values():
    assert architecture_similarity("abcd", "abd") == 0.75
    assert architecture_similarity("ab", "cd") == 0
    # a leading gap is free at zero borders only; the trailing one always costs
    assert architecture_similarity("xxxab", "ab") == pytest.approx(2 / 5)
    assert architecture_similarity("ab", "cb", mismatch=-3) == pytest.approx(1 / 3)


def test_models():
    vit = vitkit.build("vit_femto", img_size=8, in_chans=1, num_classes=3)
    deeper = vitkit.build("vit_femto", img_size=8, in_chans=1, num_classes=3, depth=len(vit.blocks) + 1)
    resnet = timm.create_model("resnet18")
    assert architecture_similarity(vit, vit) == architecture_similarity(resnet, resnet) == 1
    near, far = architecture_similarity(vit, deeper), architecture_similarity(vit, resnet)
    assert 1 > near > 0.5 > far
    assert far == architecture_similarity(resnet, vit)
    assert select_diverse({"vit": vit, "deeper": deeper, "resnet": resnet}, 2) == ["vit", "resnet"]


def test_words_of_layers():
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.1), nn.Identity(), nn.MultiheadAttention(8, 2)
    )
    assert layer_tokens(model) == ["Conv", "BatchNorm", "GELU", "Attention"]
    # timm's norm holds its activation as a child; both are layers
    assert layer_tokens(timm.layers.BatchNormAct2d(8)) == ["BatchNorm", "ReLU"]
    block = vitkit.build("vit_femto", img_size=8).blocks[0]
    assert layer_tokens(block) == ["LayerNorm", "Attention", "LayerNorm", "Linear", "GELU", "Linear"]


def test_refusals():
    with pytest.raises(ValueError, match="Identity"):
        architecture_similarity(nn.Identity(), "ab")
    with pytest.raises(ValueError, match="'zero' or 'linear'"):
        architecture_similarity("ab", "ab", borders="none")
    with pytest.raises(ValueError, match="match=0"):
        architecture_similarity("ab", "ab", match=0)
    with pytest.raises(ValueError, match="1 to 1"):
        select_diverse({"a": "ab"}, 2)
