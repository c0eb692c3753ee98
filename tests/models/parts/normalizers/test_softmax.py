"""The explicit softmax is the host."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from vitkit.models.build import build
from vitkit.models.parts.normalizers.softmax import Softmax
from vitkit.models.swap import swap
from vitkit.models.vit import ViT


def test_reproduces_the_host() -> None:
    torch.manual_seed(0)
    model = ViT(img_size=8, patch_size=2, in_chans=1, num_classes=5, embed_dim=32, depth=2, num_heads=2).eval()
    images = torch.rand(3, 1, 8, 8)
    before = model(images)
    record = swap(model, "normalizer", Softmax)
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-5)
    record.undo()
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_reproduces_the_host_on_padded_tokens() -> None:
    torch.manual_seed(0)
    model = ViT(img_size=8, patch_size=2, in_chans=1, num_classes=5, embed_dim=32, depth=2, num_heads=2).eval()
    x, layout = model.embed(torch.rand(3, 1, 8, 8))
    layout = layout.replace(valid=torch.rand(3, 16) > 0.3)
    before = model.readout(*model.run(x, layout))
    swap(model, "normalizer", Softmax)
    torch.testing.assert_close(model.readout(*model.run(x, layout)), before, rtol=0, atol=1e-5)


def test_a_query_without_keys_gets_zeros_and_finite_gradients() -> None:
    scores = torch.randn(1, 1, 3, 3, requires_grad=True)
    mask = torch.tensor([[True, False, True]])
    weights = Softmax()(scores, mask[:, None, :, None] & mask[:, None, None, :])
    assert weights[0, 0, 1].eq(0).all()
    weights.square().sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_a_row_of_forbidden_scores_gives_zeros_and_finite_gradients() -> None:
    scores = torch.randn(1, 1, 3, 4, requires_grad=True)
    forbidden = torch.tensor([[False, True, False, True], [True] * 4, [False] * 4])
    weights = Softmax()(scores.masked_fill(forbidden, -torch.inf))
    torch.testing.assert_close(weights[0, 0, 0, ::2], scores[0, 0, 0, ::2].softmax(-1))
    assert weights[0, 0, 1].eq(0).all() and weights[0, 0, 0, 1::2].eq(0).all()
    torch.testing.assert_close(weights[0, 0, 2], scores[0, 0, 2].softmax(-1))
    weights.square().sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert Softmax()(torch.full((1, 1, 1, 2), torch.nan)).isnan().all()  # a broken model is seen


@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    closed=st.sampled_from([0.0, 0.3, 0.7]),
    masked=st.booleans(),
)
def test_what_the_first_key_allows_does_not_matter(
    seed: int, shape: tuple[int, int, int, int], closed: float, masked: bool
) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(shape)
    mask = torch.rand(shape[0], 1, *shape[2:]) >= closed
    given_ = (scores, mask) if masked else (scores.masked_fill(~mask, -torch.inf), None)
    exp = scores.exp() * mask
    expected = exp / exp.sum(-1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(Softmax()(*given_), expected)


def test_a_graph_knows_no_values_and_agrees() -> None:
    scores = torch.randn(2, 3, 4, 5).masked_fill(torch.rand(2, 3, 4, 5) < 0.5, -torch.inf)
    compiled = torch.compile(Softmax(), backend="eager", fullgraph=True)
    for example in (scores, scores.masked_fill(scores == -torch.inf, 0.0)):
        torch.testing.assert_close(compiled(example), Softmax()(example))


def test_it_has_a_name() -> None:
    plain = build("vit_femto", img_size=8, in_chans=1, num_classes=5).eval()
    named = build("vit_femto", img_size=8, in_chans=1, num_classes=5, normalizer="softmax").eval()
    named.load_state_dict(plain.state_dict())
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(named(images), plain(images), rtol=0, atol=1e-5)


def test_it_maps_over_a_batch() -> None:
    scores = torch.randn(3, 1, 2, 4, 4)
    torch.testing.assert_close(torch.vmap(Softmax())(scores), torch.stack([Softmax()(s) for s in scores]))
