from __future__ import annotations

import copy
import math

import pytest
import torch

from vitkit.errors import BadInput, UnknownName
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.positions.loope import LOOPE
from vitkit.models.scan_order import scan_order
from vitkit.models.spec import NeedsFixedGrid
from vitkit.models.swap import swap
from vitkit.testing.checks import check_part
from vitkit.testing.worlds import tiny_vit


def host(img_size=(10, 14), patch_size=2, in_chans=3, warm=True, loope=None, **options):
    shape = {"embed_dim": 16, "depth": 2, "num_heads": 2} | options
    model = tiny_vit(img_size=img_size, patch_size=patch_size, in_chans=in_chans, num_classes=5, **shape)
    # the host's head starts at zero, which would hide every gradient in the first step
    torch.nn.init.normal_(model.head.weight, std=0.3)
    record = swap(model, "position", LOOPE, warm=warm, **(loope or {}))
    return model, record


def wake(part):
    """Give the last layer weights, so that shifts are not zero."""
    torch.nn.init.normal_(part.context.to_shift.weight, std=0.5)


def reference(places, dim):
    """sin and cos of X·10000^(−2k/D), one number at a time."""
    freq = [10000 ** (-2 * k / dim) for k in range(dim // 2)]
    rows = [[math.sin(x * f) for f in freq] + [math.cos(x * f) for f in freq] for x in places]
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("order", ["raster", "hilbert", "gilbert"])
def test_static_code_is_the_sinusoid_of_the_visit_number(order):
    part = LOOPE(12, (5, 7), (2, 2), num_prefix=0, order=order, context=False)
    x = torch.randn(2, 35, 12)
    visited = scan_order(5, 7, order).argsort().tolist()
    expected = x + reference(visited, 12)
    torch.testing.assert_close(part.embed(x, TokenLayout(grid=(5, 7))), expected, atol=1e-5, rtol=1e-5)


def test_without_context_or_with_a_zeroed_last_layer_the_image_does_not_matter():
    layout = TokenLayout(grid=(5, 7), prefix=(("class", 1),))
    static = LOOPE(16, (5, 7), (2, 2), context=False)
    fresh = LOOPE(16, (5, 7), (2, 2))
    fresh.prefix = static.prefix
    x = torch.randn(3, 36, 16)
    expected = static.embed(x, layout)
    for images in (torch.rand(3, 3, 10, 14), torch.zeros(3, 3, 10, 14)):
        assert torch.equal(fresh.embed(x, layout, images), expected)
    wake(fresh)
    assert not torch.equal(fresh.embed(x, layout, torch.rand(3, 3, 10, 14)), expected)


def test_shifts_differ_between_images_and_stay_below_one():
    part = LOOPE(16, (5, 7), (2, 2)).eval()
    wake(part)
    layout = TokenLayout(grid=(5, 7), prefix=(("class", 1),))
    images = torch.rand(4, 3, 10, 14)
    shift = part.places(layout, images) - part.visit
    assert shift.shape == (4, 35)
    assert not torch.allclose(shift[0], shift[1])
    # a saturated tanh is 1 in float32; the shift still is not
    part.context.to_shift.bias.data.fill_(100)
    assert part.context(images).abs().max() < 1
    assert part.context(images).abs().min() > 0.999


def test_the_hosts_table_leaves_and_comes_back():
    model = tiny_vit(img_size=(10, 14), patch_size=2, in_chans=3, embed_dim=16, num_heads=2, depth=1).eval()
    images = torch.rand(2, 3, 10, 14)
    before, keys = model(images), list(model.state_dict())
    record = swap(model, "position", LOOPE)
    assert model.pos_embed is None
    assert not any("pos_embed" in name for name, _ in model.named_parameters())
    record.undo()
    assert torch.equal(model(images), before)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("options", [{"class_token": False, "global_pool": "avg"}, {}, {"reg_tokens": 4}])
@pytest.mark.parametrize("in_chans", [1, 3, 6])
def test_runs_with_any_prefix_and_channels_and_every_parameter_learns(options, in_chans):
    model, _ = host(in_chans=in_chans, **options)
    images, labels = torch.rand(4, in_chans, 10, 14), torch.arange(4)
    reached: set[str] = set()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        for name, p in model.position.named_parameters():
            assert p.grad is not None
            assert torch.isfinite(p.grad).all()
            if p.grad.any():
                reached.add(name)
        optimizer.step()
    assert reached == {name for name, _ in model.position.named_parameters()}


def test_prefix_tokens_keep_a_learned_vector_each():
    part = LOOPE(16, (5, 7), (2, 2), num_prefix=5, context=False)
    layout = TokenLayout(grid=(5, 7), prefix=(("class", 1), ("register", 4)))
    x = torch.zeros(2, 40, 16)
    assert torch.equal(part.embed(x, layout)[1, :5], part.prefix[0])
    assert LOOPE(16, (5, 7), (2, 2), num_prefix=0).prefix is None


def test_other_grids_need_the_static_code():
    model, _ = host(dynamic_img_size=True)
    with pytest.raises(NeedsFixedGrid, match="5×7"):
        model(torch.rand(1, 3, 12, 14))
    model, _ = host(dynamic_img_size=True, loope={"context": False})
    assert model(torch.rand(1, 3, 12, 14)).shape == (1, 5)


def test_images_that_do_not_fill_the_grid_are_resized():
    part = LOOPE(16, (5, 7), (2, 2), num_prefix=0)
    wake(part)
    images = torch.rand(2, 3, 9, 13)
    resized = torch.nn.functional.interpolate(images, size=(10, 14), mode="bilinear")
    layout = TokenLayout(grid=(5, 7))
    assert torch.equal(part.places(layout, images), part.places(layout, resized))


def test_reduced_tokens_and_a_missing_image_are_refused():
    part = LOOPE(16, (2, 2), (2, 2), num_prefix=0)
    layout = TokenLayout(grid=(2, 2))
    with pytest.raises(ValueError, match="full|every cell"):
        part.embed(torch.zeros(1, 4, 16), layout.replace(valid=torch.ones(1, 4, dtype=torch.bool)))
    with pytest.raises(BadInput, match="images"):
        part.embed(torch.zeros(1, 4, 16), layout)
    with pytest.raises(BadInput, match="prefix"):
        part.embed(torch.zeros(1, 5, 16), layout.with_prefix("class", 1), torch.rand(1, 3, 4, 4))


def test_bad_options_name_what_is_allowed():
    with pytest.raises(UnknownName, match="gilbert"):
        LOOPE(16, (2, 2), (2, 2), order="gilbrt")
    with pytest.raises(BadInput, match="even"):
        LOOPE(15, (2, 2), (2, 2))


def test_bfloat16_keeps_the_places_exact():
    part = LOOPE(16, (20, 20), (2, 2), num_prefix=0, in_chans=1).to(torch.bfloat16)
    layout = TokenLayout(grid=(20, 20))
    places = part.places(layout, torch.rand(2, 1, 40, 40, dtype=torch.bfloat16))
    # bfloat16 cannot tell 398 from 399
    assert torch.equal(places[0].sort().values, torch.arange(400.0))
    out = part.embed(torch.zeros(2, 400, 16, dtype=torch.bfloat16), layout, torch.rand(2, 1, 40, 40).bfloat16())
    assert out.dtype == torch.bfloat16
    model, _ = host()
    assert model.to(torch.bfloat16)(torch.rand(2, 3, 10, 14).bfloat16()).isfinite().all()


def test_state_dict_copy_and_eval_are_repeatable():
    model, _ = host()
    wake(model.position)
    model(torch.rand(4, 3, 10, 14))
    model.eval()
    images = torch.rand(2, 3, 10, 14)
    kept = images.clone()
    expected = model(images)
    assert torch.equal(images, kept)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    other, _ = host(seed=7)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(images), expected)
    # one image alone gets what it gets in a batch
    torch.testing.assert_close(model(images[:1]), expected[:1])


def test_activation_checkpointing_changes_nothing():
    model, _ = host()
    wake(model.position)
    images = torch.rand(3, 3, 10, 14)
    grads = []
    for on in (False, True):
        again = copy.deepcopy(model)
        again.set_grad_checkpointing(on)
        again(images).square().sum().backward()
        grads.append(again.position.context.to_shift.weight.grad)
    torch.testing.assert_close(*grads)


def test_compiles_as_one_graph():
    model, _ = host()
    wake(model.position)
    model.eval()
    images = torch.rand(2, 3, 10, 14)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("options", [{}, {"context": False, "order": "raster"}])
def test_conforms_to_the_rules_of_parts(options):
    assert not check_part(LOOPE, **options).refused


def test_table_has_the_grids_shape():
    part = LOOPE(16, (5, 7), (2, 2), order="raster")
    torch.testing.assert_close(part.table()[1, 2], reference([9], 16)[0], atol=1e-5, rtol=1e-5)


def test_a_detour_through_half_precision_leaves_places_and_planes_exact():
    model, _ = host()
    wake(model.position)
    model.eval()
    images, state = torch.rand(2, 3, 10, 14), copy.deepcopy(model.state_dict())
    before = model(images)
    model.bfloat16().float().load_state_dict(state)
    assert torch.equal(model(images), before)
    assert not any("frequency" in name or "planes" in name or "static" in name for name in state)


def test_planes_are_column_and_row():
    part = LOOPE(16, (2, 3), (2, 4), in_chans=1, num_prefix=0)
    planes = part.context.planes.value
    assert planes.shape == (1, 2, 4, 12)
    torch.testing.assert_close(planes[0, 0, 3], torch.arange(12) / 11)
    torch.testing.assert_close(planes[0, 1, :, 5], torch.arange(4) / 3)


def test_the_shift_is_the_equation_layer_by_layer():
    torch.manual_seed(0)
    part = LOOPE(16, (5, 7), (2, 2), in_chans=2, num_prefix=0).eval()
    wake(part)
    part.context.norm.running_mean.fill_(0.2)
    part.context.norm.running_var.fill_(0.5)
    images = torch.rand(3, 2, 10, 14)
    rows = (torch.arange(10) / 9)[:, None].expand(10, 14)
    cols = (torch.arange(14) / 13)[None].expand(10, 14)
    hidden = torch.cat([images, torch.stack([cols, rows]).expand(3, -1, -1, -1)], dim=1)
    convs = [m for m in part.context.features if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convs] == [32, 16, 8, 4, 1]
    assert [c.kernel_size for c in convs] == [(2, 2)] + [(5, 5)] * 4
    for conv in convs:
        padding = 0 if conv.kernel_size == (2, 2) else 2
        hidden = torch.nn.functional.conv2d(hidden, conv.weight, conv.bias, conv.stride, padding)
        hidden = torch.nn.functional.gelu(hidden)
    flat = ((hidden - 0.2) / (0.5 + 1e-5) ** 0.5).flatten(1)
    expected = torch.tanh(flat @ part.context.to_shift.weight.T)
    torch.testing.assert_close(part.context(images), expected, atol=1e-5, rtol=1e-4)
    places = scan_order(5, 7, "gilbert").argsort() + expected
    layout = TokenLayout(grid=(5, 7))
    found = part.embed(torch.zeros(3, 35, 16), layout, images)
    for b in range(3):
        torch.testing.assert_close(found[b], reference(places[b].tolist(), 16), atol=1e-4, rtol=1e-4)
