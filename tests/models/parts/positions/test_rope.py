from __future__ import annotations

import math

import pytest
import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, RotaryEmbeddingMRope

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.positions.rope import Rotary, RotaryTable, draw_warp

GRID = (5, 7)
ROPES = {
    "axial": lambda **o: RotaryEmbeddingCat(16, in_pixels=False, **o),
    "axial, columns first": lambda **o: RotaryEmbeddingCat(16, in_pixels=False, grid_indexing="xy", **o),
    "axial, offset and reference": lambda **o: RotaryEmbeddingCat(
        16, in_pixels=False, grid_offset=1.0, ref_feat_shape=(4, 6), grid_indexing="xy", rotate_half=True, **o
    ),
    "axial in pixels": lambda **o: RotaryEmbeddingCat(16, in_pixels=True, **o),
    "axial, centred": lambda **o: RotaryEmbeddingCat(
        16, in_pixels=False, grid_type="centered", normalize_coords="max", **o
    ),
    "DINOv3": lambda **o: RotaryEmbeddingDinoV3(16, **o),
    "DINOv3 by the longer side": lambda **o: RotaryEmbeddingDinoV3(
        16, normalize_coords="max", grid_offset=0.25, grid_indexing="xy", rotate_half=False, **o
    ),
    "DINOv3 by the shorter side": lambda **o: RotaryEmbeddingDinoV3(16, normalize_coords="min", **o),
    "mixed": lambda **o: RotaryEmbeddingMixed(64, depth=3, num_heads=4, **o),
    "mixed, rows first": lambda **o: RotaryEmbeddingMixed(64, depth=3, num_heads=4, grid_indexing="ij", **o),
    "M-RoPE": lambda feat_shape=None, **o: RotaryEmbeddingMRope(16, mrope_section=(2, 3, 3), **o),
}


def reference(rope, grid=GRID):
    """timm's table, (depth or 1, H or 1, N, 2d)."""
    table = rope.get_embed(list(grid))
    return table if table.ndim == 4 else table[None, None]


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("cached", [False, True])
def test_tables_of_a_full_grid_and_of_the_same_coordinates_are_timms(kind, cached):
    torch.manual_seed(0)
    rope = ROPES[kind](feat_shape=GRID if cached else None).eval()
    full = TokenLayout(grid=GRID)
    # the same places as coordinates, as after a permutation that moves nothing
    placed = full.replace(coords=full.coordinates())
    batched = full.take(torch.arange(35).expand(2, -1))
    for depth in (0, 2):
        expected = reference(rope)[min(depth, len(reference(rope)) - 1)]
        for layout in (full, placed, batched):
            table = RotaryTable.start(rope, layout).of_block(depth)
            torch.testing.assert_close(
                table.expand(*table.shape[:-3], *expected.shape).reshape(-1, *expected.shape),
                expected.expand(max(1, table.numel() // expected.numel()), *expected.shape),
                atol=2e-5,
                rtol=0,
            )


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (8, 3)])
def test_other_grids_than_the_one_it_was_made_for(kind, grid):
    torch.manual_seed(0)
    made_for, free = ROPES[kind](feat_shape=GRID), ROPES[kind]()
    if "mixed" in kind:
        free.load_state_dict(made_for.state_dict())
    table = RotaryTable.start(made_for.eval(), TokenLayout(grid=grid)).of_block(1)
    expected = reference(free.eval(), grid)
    expected = expected[min(1, len(expected) - 1)]
    torch.testing.assert_close(table.expand_as(expected), expected, atol=1e-4, rtol=0)


def angles_of(rope, row, col):
    """θ of one place by the definition, a loop over channels."""
    return [row * float(f) for f in rope.bands] + [col * float(f) for f in rope.bands]


def test_a_merged_token_is_turned_by_the_size_weighted_mean_of_its_patches_angles():
    rope = ROPES["axial"]().eval()
    layout = TokenLayout(grid=GRID)
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(0, 12, (2, 35), generator=generator)
    second = torch.randint(0, 5, (2, 12), generator=generator)
    merged = layout.regroup(first, 12).regroup(second, 5)
    start = RotaryTable.start(rope, layout)
    table = start.at(merged).of_block(0)
    assert table.shape == (2, 1, 5, 32)
    for image in range(2):
        for group in range(5):
            patches = [j for j in range(35) if second[image, first[image, j]] == group]
            if not patches:
                continue
            each = torch.tensor([angles_of(rope, j // 7, j % 7) for j in patches])
            mean = each.mean(0).repeat_interleave(2)
            expected = torch.cat([mean.sin(), mean.cos()])
            torch.testing.assert_close(table[image, 0, group], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ROPES)
def test_scores_depend_on_the_difference_of_places_only(kind):
    torch.manual_seed(0)
    rope = ROPES[kind]().eval()
    half = bool(getattr(rope, "rotate_half", "M-RoPE" in kind))
    part = Rotary(16, half, depth=1)
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 4, 1, 16)
    coords = torch.tensor([[0.1, 0.3]]), torch.tensor([[0.5, 0.2]])
    scores = []
    for shift in (0.0, 0.25):
        turned = []
        for x, place in zip((q, k), coords):
            layout = TokenLayout(grid=GRID, coords=place + shift)
            layout = layout.replace(rotation=RotaryTable.start(rope, layout))
            turned.append(part.rotate(x, x, layout)[0])
        scores.append((turned[0] * turned[1]).sum(-1))
        torch.testing.assert_close(turned[0].norm(dim=-1), q.norm(dim=-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores[1], scores[0], atol=1e-4, rtol=1e-4)
    assert (scores[0] - (q * k).sum(-1)).abs().max() > 1e-2


def test_a_table_is_made_again_only_when_rows_moved():
    rope = ROPES["DINOv3"](feat_shape=GRID).eval()
    layout = TokenLayout(grid=GRID, prefix=(("class", 1),))
    layout = layout.replace(rotation=RotaryTable.start(rope, layout))
    longer = layout.with_prefix("prompt", 3).replace(valid=torch.ones(2, 35, dtype=torch.bool))
    assert longer.rotation.follow(longer) is longer
    assert longer.rotation.table.data_ptr() == rope.pos_embed_cached.data_ptr()
    moved = layout.take(torch.tensor([[3, 4]]))
    followed = moved.rotation.follow(moved)
    assert followed.rotation is not layout.rotation
    assert followed.rotation.follow(followed) is followed
    torch.testing.assert_close(followed.rotation.of_block(0)[0, 0], reference(rope)[0, 0, [3, 4]])


@pytest.mark.parametrize("kind", ["axial", "mixed", "DINOv3 by the longer side"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_turning_by_complex_numbers_is_timms_turning(kind, dtype, monkeypatch):
    rope = ROPES[kind]().to(dtype)
    layout = TokenLayout(grid=GRID, prefix=(("class", 1),))
    layout = layout.replace(rotation=RotaryTable.start(rope, layout))
    wide = torch.randn(2, 4, 36, 34, dtype=dtype)
    memory = {
        "rows": wide[..., :16].contiguous(),
        "part of wider rows": wide[..., 1:17],
        "channels first": wide[..., :16].mT.contiguous().mT,
        "odd rows": wide[..., :33].contiguous()[..., :16],
    }
    for x in memory.values():
        q, k = x.requires_grad_().clone(memory_format=torch.preserve_format), x
        found = Rotary(16, depth=1).rotate(q, k, layout)
        monkeypatch.setattr(Rotary, "_by_complex_numbers", lambda *_: False)
        expected = Rotary(16, depth=1).rotate(q, k, layout)
        monkeypatch.undo()
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        for a, b in zip(found, expected):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
        slopes = [torch.autograd.grad(out[1].square().sum(), x)[0] for out in (found, expected)]
        torch.testing.assert_close(*slopes, atol=tolerance * 10, rtol=tolerance)


def test_frames_of_a_video_share_their_places():
    rope = ROPES["axial"]().eval()
    table = RotaryTable.start(rope, TokenLayout(grid=(3, *GRID))).of_block(0)
    torch.testing.assert_close(table, reference(rope)[0, 0].repeat(3, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["axial", "axial, offset and reference", "DINOv3", "mixed", "M-RoPE"])
def test_augmented_tables_are_timms_for_the_same_seed_and_hold_for_moved_tokens(kind):
    augment = {"shift_coords": 0.5, "jitter_coords": 2.0, "rescale_coords": 1.5}
    torch.manual_seed(0)
    rope = ROPES[kind](feat_shape=GRID, **augment).train()
    layout = TokenLayout(grid=GRID)
    torch.manual_seed(3)
    expected = reference(rope)[-1]
    torch.manual_seed(3)
    start = RotaryTable.start(rope, layout)
    table = start.of_block(2)
    torch.testing.assert_close(table.expand_as(expected), expected, atol=1e-4, rtol=0)
    assert (expected - reference(rope.eval())[-1]).abs().max() > 1e-2
    # one draw per forward: rows that stay keep their augmented place
    order = torch.randperm(35)[None]
    moved = start.at(layout.take(order)).of_block(2)
    torch.testing.assert_close(moved[0].expand_as(expected), expected[:, order[0]], atol=1e-4, rtol=0)
    assert RotaryTable.start(rope, layout).warp is None


def test_the_drawn_maps_stay_in_their_ranges():
    rope = ROPES["axial"](shift_coords=0.5, jitter_coords=2.0, rescale_coords=3.0)
    scales, shifts = zip(*(draw_warp(rope) for _ in range(300)))
    scale, shift = torch.stack(scales), torch.stack(shifts)
    assert (shift / scale).abs().max() <= 0.5 + 1e-6
    assert scale.log().abs().max() <= math.log(6.0) + 1e-6
    assert scale.max() > 4
    assert scale.min() < 0.25
    # jitter is per axis, rescaling is shared
    assert (scale[:, 0] / scale[:, 1]).log().abs().max() <= 2 * math.log(2.0) + 1e-6
    only = draw_warp(ROPES["axial"](rescale_coords=3.0))
    assert only[0].unique().numel() == 1
    assert only[1].abs().max() == 0


def test_learned_frequencies_get_gradients_through_moved_tokens():
    rope = ROPES["mixed"]()
    layout = TokenLayout(grid=GRID).regroup(torch.arange(35).expand(2, -1) // 2, 18)
    layout = layout.replace(rotation=RotaryTable.start(rope, layout))
    q = torch.randn(2, 4, 18, 16)
    out, _ = Rotary(16, depth=1).rotate(q, q, layout)
    (out * torch.randn_like(out)).sum().backward()
    assert (rope.freqs.grad[:, 1] != 0).all()
    assert (rope.freqs.grad[:, [0, 2]] == 0).all()


def test_what_cannot_be_turned_says_why():
    rope = ROPES["axial"]().eval()
    part, q = Rotary(16, depth=4), torch.randn(2, 4, 36, 16)
    layout = TokenLayout(grid=GRID, prefix=(("class", 1),))
    with pytest.raises(BadInput, match=r"Block 4 .* vit\.embed\(images\)"):
        part.rotate(q, q, layout)
    layout = layout.replace(rotation=RotaryTable.start(rope, layout))
    with pytest.raises(BadInput, match="16 channels per head and block 4 has 12"):
        part.rotate(q[..., :12], q[..., :12], layout)
    with pytest.raises(BadInput, match="describes 35 patch tokens and x has 33"):
        part.rotate(q[:, :, :34], q[:, :, :34], layout)
    with pytest.raises(BadInput, match="Linear is no rotary embedding"):
        RotaryTable.start(torch.nn.Linear(2, 2), layout)
