from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitkit.models.build import build
from vitkit.models.dct import dct_matrix
from vitkit.models.parts.tokenizers import token_graying
from vitkit.models.parts.tokenizers.token_graying import gray


def tokens(n=6, k=5, seed=0, dtype=torch.float64):
    return torch.randn(3, n, k, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("mode", ["dct", "svd"])
def test_eps_one_is_the_identity(mode):
    x = tokens()
    torch.testing.assert_close(gray(x, 1.0, mode), x, atol=1e-12, rtol=0)
    # and the formula itself tends to it, not only the short cut
    torch.testing.assert_close(gray(x, 1 - 1e-13, mode), x, atol=1e-11, rtol=0)


@given(n=st.integers(2, 7), k=st.integers(2, 7), eps=st.floats(0.2, 0.99), seed=st.integers(0, 50))
def test_svd_mode_raises_the_condition_number_to_eps(n, k, eps, seed):
    x = tokens(n, k, seed)
    before, after = torch.linalg.cond(x), torch.linalg.cond(gray(x, eps, "svd"))
    torch.testing.assert_close(after, before.pow(eps), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.linalg.matrix_norm(gray(x, eps, "svd"), 2), torch.linalg.matrix_norm(x, 2))


def test_dct_mode_is_the_equation():
    x, eps = tokens(4, 3, 1), 0.7
    rows, cols = dct_matrix(4, torch.float64), dct_matrix(3, torch.float64)
    expected = torch.empty_like(x)
    for b in range(3):
        y = rows @ x[b] @ cols.T
        m = y.abs().max()
        for i in range(4):
            for j in range(3):
                y[i, j] = y[i, j] * ((y[i, j].abs() + 1e-6 * m) / (m + 1e-6 * m)) ** (eps - 1)
        expected[b] = rows.T @ y @ cols
    torch.testing.assert_close(gray(x, eps), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("mode", ["dct", "svd"])
@pytest.mark.parametrize("image", ["zero", "one coefficient"])
def test_gradient_is_finite_at_zero_coefficients(mode, image):
    x = torch.zeros(1, 4, 6) if image == "zero" else torch.ones(1, 4, 6)
    x.requires_grad_()
    out = gray(x, 0.6, mode)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(x.grad).all()
    if image == "zero":
        assert out.abs().max() == 0


def test_dct_gradient():
    assert torch.autograd.gradcheck(lambda x: gray(x, 0.8), tokens(3, 4, 2).requires_grad_())


def test_it_adds_no_parameters_and_keeps_their_names():
    plain = build("vit_femto", img_size=(20, 28), patch_size=4, in_chans=3, num_classes=2)
    model = build("vit_femto", img_size=(20, 28), patch_size=4, in_chans=3, num_classes=2, tokenizer="token-graying")
    assert model.swaps[0].params_added == 0
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 20, 28)
    assert not torch.allclose(model.forward_features(x), plain.forward_features(x), atol=1e-4)
    model.patch_embed.eps = 1.0
    torch.testing.assert_close(model.eval().forward_features(x), plain.eval().forward_features(x), atol=1e-5, rtol=1e-4)


def test_place_embed_works_on_the_embedded_tokens():
    model = build("vit_femto", img_size=16, patch_size=4, tokenizer=("token-graying", {"place": "embed", "eps": 0.8}))
    plain = build("vit_femto", img_size=16, patch_size=4)
    model.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model.tokenize(x)[0], gray(plain.tokenize(x)[0], 0.8), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"mode": "fft"}, {"eps": 0.0}, {"eps": 1.2}, {"place": "head"}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build("vit_femto", img_size=16, tokenizer=("token-graying", options))


def test_images_that_cannot_be_cut_are_refused():
    model = build("vit_femto", img_size=16, patch_size=4, tokenizer="token-graying")
    with pytest.raises(ValueError, match="16×12"):
        model(torch.rand(1, 3, 16, 14))


@pytest.mark.parametrize("mode", ["dct", "svd"])
def test_eps_near_one_is_the_identity_in_float32(mode):
    x = tokens(20, 12, dtype=torch.float32)
    torch.testing.assert_close(gray(x, 1 - 1e-9, mode), x, atol=5e-6, rtol=0)
    assert torch.equal(gray(x, 1.0, mode), x)


@pytest.mark.parametrize("place", ["patches", "embed"])
def test_the_matrices_are_made_once_and_stay_exact(place, monkeypatch):
    part = ("token-graying", {"place": place, "eps": 0.7})
    model = build("vit_femto", img_size=(12, 20), patch_size=4, num_classes=2, tokenizer=part).eval()
    x, state = torch.rand(2, 3, 12, 20), {k: v.clone() for k, v in model.state_dict().items()}
    before = model.tokenize(x)[0]
    model.bfloat16().float().load_state_dict(state)
    monkeypatch.setattr(token_graying, "dct_matrix", None)
    assert torch.equal(model.tokenize(x)[0], before)


def test_other_image_sizes_get_matrices_of_their_own():
    model = build(
        "vit_femto", img_size=(12, 20), patch_size=4, num_classes=2, dynamic_img_size=True, tokenizer="token-graying"
    )
    x = torch.rand(2, 3, 8, 24)
    found, layout = model.tokenize(x)
    assert layout.grid == (2, 6)
    expected = gray(model.patch_embed._patches(x), 0.95) @ model.patch_embed.proj.weight.flatten(1).T
    torch.testing.assert_close(found, expected + model.patch_embed.proj.bias, atol=1e-5, rtol=1e-4)


def test_other_channels_are_refused():
    model = build("vit_femto", img_size=16, patch_size=4, in_chans=1, tokenizer="token-graying")
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        model(torch.rand(1, 3, 16, 16))
