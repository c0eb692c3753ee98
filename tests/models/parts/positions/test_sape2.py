from __future__ import annotations

import math

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.positions.sape2 import SaPE2, gated_positions
from vitkit.models.swap import swap
from vitkit.testing.checks import PLACES, check_part
from vitkit.testing.worlds import tiny_vit

GRID = (5, 7)
LAYOUT = TokenLayout(grid=GRID)


def host(warm=True, options=None, **shape):
    model = tiny_vit(
        img_size=(10, 14), patch_size=2, in_chans=3, num_classes=5,
        **({"embed_dim": 16, "depth": 2, "num_heads": 2} | shape),
    )  # fmt: skip
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model, swap(model, "position", SaPE2, warm=warm, **(options or {}))


def part(head_dim=4, max_pos=6, **options):
    torch.manual_seed(0)
    made = SaPE2(head_dim, max_pos, **options)
    torch.nn.init.normal_(made.table_x)
    torch.nn.init.normal_(made.table_y)
    return made


def queries_and_keys(grid=GRID, prefix=0, batch=2, heads=3, dim=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, prefix + math.prod(grid), dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def count(gates, first, last):
    """Signed sum of gates over (first, last]."""
    if last >= first:
        return sum(gates[first + 1 : last + 1])
    return -sum(gates[last + 1 : first + 1])


def slow_bias(made, q, k, grid, valid=None):
    """The definition, one pair of patches at a time."""
    h, w = grid
    out = torch.zeros(h * w, h * w)
    for i in range(h * w):
        gate = [torch.sigmoid(q[i] @ k[j] / math.sqrt(len(q[i]))) for j in range(h * w)]
        if valid is not None:
            gate = [g * float(v) for g, v in zip(gate, valid)]
        for j in range(h * w):
            (r_i, c_i), (r_j, c_j) = divmod(i, w), divmod(j, w)
            places = (
                (count(gate[r_j * w : (r_j + 1) * w], c_i, c_j), made.table_x),
                (count(gate[c_j::w], r_i, r_j), made.table_y),
            )
            for place, table in places:
                p = min(max(float(place), -made.max_pos), made.max_pos)
                a = min(math.floor(p), made.max_pos - 1)
                row = a + made.max_pos
                out[i, j] += (1 - (p - a)) * (q[i] @ table[row]) + (p - a) * (q[i] @ table[row + 1])
    return out


def test_gates_of_one_give_columns_and_rows():
    across, down = gated_positions(torch.ones(2, 35, 35), GRID)
    index = torch.arange(35)
    row, col = index // 7, index % 7
    assert torch.equal(across[1], (col[None] - col[:, None]).float())
    assert torch.equal(down[0], (row[None] - row[:, None]).float())


@pytest.mark.parametrize("max_pos", [6, 2, 1])
@torch.no_grad()
def test_bias_is_the_definition_pair_by_pair(max_pos):
    made = part(max_pos=max_pos)
    q, k = queries_and_keys((3, 4), batch=1, heads=2)
    # large gates reach the clamp at max_pos 1 and 2
    q, k = q + 1, k + 1
    found = made.bias(q, k, TokenLayout(grid=(3, 4)))
    for head in range(2):
        expected = slow_bias(made, q[0, head], k[0, head], (3, 4))
        torch.testing.assert_close(found[0, head], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_open_gates_are_a_relative_embedding():
    made, plain = part(), part(gated=False)
    q, _ = queries_and_keys()
    q = q.abs() + 0.1
    k = torch.full_like(q, 1e3)
    assert bool((made.gates(q, k, LAYOUT) == 1).all())
    expected = torch.zeros(2, 3, 35, 35)
    for i in range(35):
        for j in range(35):
            dx, dy = j % 7 - i % 7, j // 7 - i // 7
            row = made.table_x[6 + dx] + made.table_y[6 + dy]
            expected[:, :, i, j] = q[:, :, i] @ row
    torch.testing.assert_close(made.bias(q, k, LAYOUT), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(plain.bias(q, -k, LAYOUT), expected, atol=1e-5, rtol=1e-6)


@torch.no_grad()
def test_invalid_cells_are_not_counted_and_prefix_pairs_get_nothing():
    made = part()
    q, k = queries_and_keys((3, 4), prefix=2, batch=2, heads=1)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, [1, 6, 11]] = False
    layout = TokenLayout(grid=(3, 4), prefix=(("class", 1), ("register", 1)), valid=valid)
    found = made.bias(q, k, layout)
    assert found.shape == (2, 1, 14, 14)
    assert not found[:, :, :2].any()
    assert not found[..., :2].any()
    for image in range(2):
        expected = slow_bias(made, q[image, 0, 2:], k[image, 0, 2:], (3, 4), valid[image])
        torch.testing.assert_close(found[image, 0, 2:, 2:], expected, atol=1e-5, rtol=1e-5)


def test_zero_tables_leave_the_host_as_it_was_only_with_its_own_positions():
    images = torch.rand(2, 3, 10, 14)
    plain = tiny_vit(img_size=(10, 14), patch_size=2, in_chans=3, num_classes=5, embed_dim=16, depth=2, num_heads=2)
    torch.nn.init.normal_(plain.head.weight, std=0.3)
    plain.eval()
    before, keys = plain(images), list(plain.state_dict())
    record = swap(plain, "position", SaPE2, keep_absolute=True)
    torch.testing.assert_close(plain(images), before, atol=1e-5, rtol=1e-5)
    record.undo()
    # a table after training is not small
    torch.nn.init.normal_(plain.pos_embed)
    before = plain(images)
    record = swap(plain, "position", SaPE2)
    assert plain.pos_embed is None
    assert not torch.allclose(plain(images), before, atol=1e-3)
    record.undo()
    assert torch.equal(plain(images), before)
    assert list(plain.state_dict()) == keys


def test_parameters_of_a_layer():
    model, record = host(options={"keep_absolute": True})
    # grid 5×7, two layers, head dim 8
    assert record.params_added == 2 * 2 * (2 * 6 + 1) * 8
    assert host(options={"max_pos": 3, "keep_absolute": True})[1].params_added == 2 * 2 * 7 * 8
    assert [len(block.attn.position) for block in model.blocks] == [1, 1]


def test_counts_are_continuous_in_the_gates():
    made = part()
    q = torch.ones(1, 1, 35, 4)
    for whole in (-2.0, 0.0, 3.0, 6.0):
        at = torch.tensor([whole - 1e-4, whole, whole + 1e-4]).reshape(1, 1, 1, 3).expand(1, 1, 35, 3)
        z = made._look_up(at, q, made.table_x)[0, 0, 0]
        assert float((z - z[1]).detach().abs().max()) < 5e-3
    # at a count that is a whole number the gates still move the bias
    at = torch.full((1, 1, 35, 1), 2.0, requires_grad=True)
    made._look_up(at, q, made.table_x).sum().backward()
    assert bool((at.grad != 0).all())


def test_gradients_go_through_gates_and_tables():
    q, k = queries_and_keys()
    q.requires_grad_()
    k.requires_grad_()
    fresh = SaPE2(4, 6)
    weight = torch.randn(2, 3, 35, 35)
    (fresh.bias(q, k, LAYOUT) * weight).sum().backward()
    assert not q.grad.any()
    assert not k.grad.any()
    assert bool(fresh.table_x.grad.any())
    assert bool(fresh.table_y.grad.any())
    made = part()
    (made.bias(q, k, LAYOUT) * weight).sum().backward()
    assert bool(q.grad.any())
    assert bool(k.grad.any())
    k.grad = None
    (part(gated=False).bias(q, k, LAYOUT) * weight).sum().backward()
    assert k.grad is None


def test_gradient_agrees_with_finite_differences():
    made = part(head_dim=3, max_pos=3).double()
    q, k = (t.double().requires_grad_() for t in queries_and_keys((2, 3), batch=1, heads=1, dim=3))
    layout = TokenLayout(grid=(2, 3))
    assert torch.autograd.gradcheck(lambda q, k: made.bias(q, k, layout), (q, k))


@torch.no_grad()
def test_translated_content_translates_the_bias():
    made, (h, w), (dr, dc) = part(), (6, 8), (2, 3)
    generator = torch.Generator().manual_seed(4)
    background = torch.randn(2, 4, generator=generator)
    content = torch.randn(2, 3, 4, 4, generator=generator)
    layout = TokenLayout(grid=(h, w))

    def canvas(row, col):
        grid = background[:, None, None].repeat(1, h, w, 1)
        grid[:, row : row + 3, col : col + 4] = content
        q, k = grid.reshape(2, 1, 1, h * w, 4)
        return made.bias(q, k, layout).reshape(h, w, h, w)

    first, second = canvas(0, 1), canvas(dr, 1 + dc)
    moved = second[dr:, dc:, dr:, dc:]
    torch.testing.assert_close(first[: h - dr, : w - dc, : h - dr, : w - dc], moved, atol=1e-5, rtol=1e-5)
    assert float((first - second).abs().max()) > 0.1


def test_other_image_sizes_need_no_new_tables():
    model, _ = host(dynamic_img_size=True)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.position[0].table_x)
    assert model(torch.rand(1, 3, 14, 18)).shape == (1, 5)


def test_explicit_and_fused_attention_agree():
    model, _ = host()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.position[0].table_x)
        torch.nn.init.normal_(block.attn.position[0].table_y)
    model.eval()
    images = torch.rand(2, 3, 10, 14)
    fused = model(images)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(images), fused, atol=1e-5, rtol=1e-5)


def test_joins_a_rotary_host():
    import vitkit

    model = vitkit.build(
        "eva02_tiny_patch14_224", img_size=56, num_classes=10, depth=2, position=(SaPE2, {"keep_absolute": True})
    )
    assert [type(p).__name__ for p in model.blocks[1].attn.position] == ["Rotary", "SaPE2"]
    assert model(torch.rand(1, 3, 56, 56)).shape == (1, 10)


def test_reduced_tokens_other_axes_and_bad_options_are_refused():
    made = part()
    q, k = queries_and_keys((3, 4), batch=1)
    layout = TokenLayout(grid=(3, 4)).take(torch.arange(6)[None])
    with pytest.raises(ValueError, match="merged"):
        made.bias(q[:, :, :6], k[:, :, :6], layout)
    with pytest.raises(BadInput, match="3 axes"):
        made.bias(q, k, TokenLayout(grid=(2, 2, 3)))
    with pytest.raises(BadInput, match="max_pos=0"):
        SaPE2(4, 0)


def test_a_single_patch_works():
    made = SaPE2.from_standard(None, _spec((1, 1)))
    q, k = queries_and_keys((1, 1))
    assert made.max_pos == 1
    assert not made.bias(q, k, TokenLayout(grid=(1, 1))).any()


def _spec(grid):
    from vitkit.models.spec import PartSpec

    return PartSpec(
        dim=8, num_heads=2, head_dim=4, mlp_ratio=2, grid=grid, num_prefix=1, depth=0, num_blocks=1,
        image_size=(4, 4), patch_size=(4, 4), in_chans=1, num_classes=2,
    )  # fmt: skip


@torch.no_grad()
def test_bfloat16_counts_stay_exact():
    made = part(max_pos=30, gated=False).to(torch.bfloat16)
    # 29 gates summed in bfloat16 would be off by whole cells
    across, _ = gated_positions(made.gates(*(torch.rand(1, 1, 30, 4, dtype=torch.bfloat16),) * 2, LAYOUT), (1, 30))
    assert torch.equal(across[0, 0, 0], torch.arange(30.0))


@pytest.mark.parametrize("options", [{}, {"gated": False}, {"max_pos": 2}, {"keep_absolute": True}])
def test_conforms(options):
    report = check_part(SaPE2, places=PLACES[1:3] if options else PLACES, dynamo=not options, **options)
    assert not report.refused
