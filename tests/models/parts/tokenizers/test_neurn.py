from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import vitkit
from vitkit.models.parts.tokenizers.neurn import NeuRN, neurn


def images(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_unfold(x, k):
    """The equation word by word: a window per pixel, its population standard deviation, the image's maximum."""
    b, c, h, w = x.shape
    windows = F.unfold(F.pad(x, (k // 2,) * 4, mode="reflect"), k).reshape(b, c, k * k, h, w)
    sigma = windows.std(dim=2, correction=0)
    return sigma / sigma.amax(dim=(1, 2, 3), keepdim=True)


def host(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "in_chans": 3, "num_classes": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = vitkit.build("vit_femto", patch_size=4, **(sizes | options)).eval()
    # timm's head starts at zero, whose answers are all alike
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("k", [3, 5, 9])
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_the_deviation_of_every_window(k, channels):
    x = images(2, channels, 11, 7)
    torch.testing.assert_close(neurn(x, k), by_unfold(x, k), atol=1e-5, rtol=0)


def test_golden_values_of_a_step_edge():
    # windows beside the edge hold three or six ones of nine: both deviate by √(2/9); further away nothing deviates
    x = torch.zeros(1, 1, 4, 6)
    x[..., 3:] = 1
    torch.testing.assert_close(neurn(x)[0, 0], torch.tensor([0.0, 0, 1, 1, 0, 0]).expand(4, 6))
    # a single bright pixel: the nine windows that hold it deviate alike
    y = torch.zeros(1, 1, 5, 5)
    y[..., 2, 2] = 1
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = 1
    torch.testing.assert_close(neurn(y)[0, 0], expected)


@settings(max_examples=30, deadline=None)
@given(
    shift=st.floats(-3, 3),
    scale=st.floats(0.05, 20),
    k=st.sampled_from([3, 5, 7]),
    seed=st.integers(0, 1000),
    per_channel=st.booleans(),
)
def test_shift_scale_and_inversion_change_nothing(shift, scale, k, seed, per_channel):
    x = images(2, 3, 9, 8, seed=seed)
    y = neurn(x, k, per_channel)
    for seen in (x + shift, x * scale, 1 - x):
        torch.testing.assert_close(neurn(seen, k, per_channel), y, atol=5e-5, rtol=0)


def test_range_and_maximum():
    x = torch.cat([images(4, 3, 8, 8), 1e-3 * images(2, 3, 8, 8, seed=1), 0.5 + 0 * images(1, 3, 8, 8)])
    y = neurn(x)
    assert y.min() >= 0
    assert y.amax((1, 2, 3)).tolist() == [1.0] * 6 + [0.0]
    # one flat channel stays empty, the others each reach one
    x[0, 1] = 0.25
    assert neurn(x[:1], per_channel=True).amax((2, 3)).tolist() == [[1.0, 0.0, 1.0]]
    assert (neurn(x[:1]).amax((2, 3)) == 1).sum() == 1


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0, 1000.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_flat_images_are_empty_and_have_no_gradient(level, dtype):
    x = torch.full((1, 2, 6, 6), level, dtype=dtype, requires_grad=True)
    y = neurn(x)
    y.sum().backward()
    assert not y.any() and not x.grad.any()
    assert y.dtype == dtype


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_half_precision_is_computed_in_single(offset):
    x = (offset + 0.01 * images(2, 3, 8, 8)).half()
    torch.testing.assert_close(neurn(x).float(), neurn(x.double()).float(), atol=1e-3, rtol=0)


def test_low_contrast_on_a_bright_ground_keeps_its_digits():
    x = images(1, 1, 12, 12, dtype=torch.float64)
    bright = (0.9 + 1e-3 * x).float()
    torch.testing.assert_close(neurn(bright).double(), neurn(x), atol=2e-4, rtol=0)


def test_gradient():
    x = images(1, 2, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(neurn, (x,))
    # half of the image is flat: the square root's slope there must not reach the input
    half = torch.cat([x.detach(), torch.zeros(1, 2, 4, 5, dtype=x.dtype)], 3).requires_grad_()
    neurn(half)[..., 1].sum().backward()
    assert half.grad.isfinite().all() and half.grad.any()


def test_has_no_parameters_and_wraps_the_weights_of_the_host():
    plain = host()
    conv = plain.patch_embed.proj
    names = {id(p) for p in plain.parameters()}
    record = vitkit.swap(plain, "tokenizer", "neurn")
    assert {id(p) for p in plain.parameters()} == names
    assert plain.patch_embed.proj is conv
    x = images(2, 3, 16, 16)
    tokens, layout = plain.tokenize(x)
    torch.testing.assert_close(tokens, conv(neurn(x)).flatten(2).transpose(1, 2))
    assert layout.grid == plain.patch_embed.grid_size == (4, 4)
    assert plain.patch_embed.num_patches == 16 and plain.patch_embed.patch_size == (4, 4)
    record.undo()
    assert plain.patch_embed.proj is conv and not isinstance(plain.patch_embed, NeuRN)


def test_a_model_behind_it_answers_alike_to_inverted_images():
    model = host(tokenizer=("neurn", {"k": 5}))
    x = images(3, 3, 16, 16)
    torch.testing.assert_close(model(1 - x), model(x), atol=1e-4, rtol=0)
    with torch.no_grad():
        assert (host()(1 - x) - host()(x)).abs().max() > 1e-2


def test_concat_starts_as_the_host_and_learns_from_the_contrast():
    plain = host()
    x = images(2, 3, 16, 16)
    before, conv = plain(x), plain.patch_embed.proj
    record = vitkit.swap(plain, "tokenizer", "neurn", concat=True)
    torch.testing.assert_close(plain(x), before, atol=1e-5, rtol=0)
    plain(x).square().sum().backward()
    assert plain.patch_embed.proj.weight.grad[:, 3:].abs().max() > 0
    assert conv.in_channels == 3 and plain.patch_embed.proj.in_channels == 6
    record.undo()
    assert plain.patch_embed.proj is conv


def test_cold_start_leaves_the_old_weights_alone():
    plain = host()
    weight = plain.patch_embed.proj.weight
    kept = weight.detach().clone()
    vitkit.swap(plain, "tokenizer", "neurn", warm=False)
    assert not torch.equal(plain.patch_embed.proj.weight, kept)
    assert torch.equal(weight, kept)


def test_stands_in_front_of_other_tokenizers():
    x = images(2, 3, 16, 16)
    for first in ("conv-stem", "token-graying"):
        model = host(tokenizer=[first, "neurn"])
        inner = model.patch_embed.tokenizer
        assert type(inner).__name__ in ("ConvStem", "TokenGraying")
        torch.testing.assert_close(model.tokenize(x)[0], inner(neurn(x))[0])


def test_images_of_several_sizes_are_seen_one_by_one():
    model = host(img_size=32, tokenizer=["charm", "neurn"])
    several = [images(3, 48, 32), images(3, 64, 80)]
    expected = model.patch_embed.tokenizer([neurn(image[None])[0] for image in several])[0]
    assert torch.equal(model.tokenize(several)[0], expected)


def test_works_at_other_image_sizes():
    model = host(dynamic_img_size=True, tokenizer="neurn")
    tokens, layout = model.tokenize(images(1, 3, 24, 16))
    assert tokens.shape == (1, 24, 32) and layout.grid == (6, 4)
    assert model(images(1, 3, 24, 16)).shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 4}, "odd"), ({"k": 1}, "at least 3"), ({"k": 33}, r"16×16 pixels.*at least 17 pixels")],
)
def test_refuses_windows_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        host(tokenizer=("neurn", options))


def test_refuses_small_images_and_a_concat_without_a_patch_embedding():
    with pytest.raises(ValueError, match="2×8 pixels"):
        neurn(images(1, 1, 2, 8), 5)
    with pytest.raises(ValueError, match="ConvStem"):
        host(tokenizer=["conv-stem", ("neurn", {"concat": True})])


def test_weights_survive_saving():
    model, other = host(tokenizer="neurn"), host(tokenizer="neurn")
    nn.init.normal_(other.patch_embed.proj.weight)
    other.load_state_dict(model.state_dict())
    x = images(1, 3, 16, 16)
    torch.testing.assert_close(other(x), model(x))
