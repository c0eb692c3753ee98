from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.nn import functional as F

from vitkit.errors import BadInput, UnknownName
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.tokenizers.charm import Charm, average_draws, scale_sides
from vitkit.models.swap import swap
from vitkit.testing.checks import check_part
from vitkit.testing.worlds import tiny_vit

SETTINGS = [
    {"budget": 20},
    {"budget": 20, "select": "frequency"},
    {"budget": 20, "select": "gradient"},
    {"budget": 20, "select": "entropy"},
    {"budget": 60, "scales": 3},
    {"budget": 60, "scales": 3, "select": "entropy"},
    {"budget": 3},
]


def host(img_size=(20, 28), in_chans=3, charm=None, **options):
    shape = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 2} | options
    model = tiny_vit(img_size=img_size, in_chans=in_chans, num_classes=5, **shape)
    nn.init.normal_(model.head.weight, std=0.3)
    record = swap(model, "tokenizer", Charm, **(charm or {}))
    return model, record


def pixels(in_chans=1, patch=2, **options):
    """A tokenizer whose tokens are the pixels of their patch."""
    dim = in_chans * patch * patch
    proj = nn.Conv2d(in_chans, dim, patch, stride=patch, bias=False)
    with torch.no_grad():
        proj.weight.copy_(torch.eye(dim).reshape(proj.weight.shape))
    return Charm(proj, None, (20, 28), **options).eval()


def patches_of(images, patch=2):
    return F.unfold(images, patch, stride=patch).mT


def padded(images, size):
    return F.pad(images, (0, size[1] - images.shape[-1], 0, size[0] - images.shape[-2]))


def as_set(rows):
    """Rows in a fixed order."""
    return torch.stack(sorted(rows, key=lambda r: r.tolist()))


@pytest.mark.parametrize("registers", [0, 4])
def test_an_image_within_the_budget_gives_the_hosts_tokens_and_positions(registers):
    plain = tiny_vit((20, 20), 2, 3, 5, embed_dim=16, depth=2, num_heads=2, reg_tokens=registers).eval()
    nn.init.normal_(plain.head.weight, std=0.3)
    model = copy.deepcopy(plain)
    swap(model, "tokenizer", Charm, budget=100)
    images = torch.rand(2, 3, 20, 20)
    (x, _), (y, layout) = plain.embed(images), model.embed(images)
    torch.testing.assert_close(y, x, atol=1e-5, rtol=0)
    assert layout.is_full_grid
    torch.testing.assert_close(model(images), plain(images), atol=1e-5, rtol=0)


def test_a_smaller_image_within_the_budget_is_padded_and_gets_interpolated_positions():
    model, _ = host(charm={"budget": 140})
    images = torch.rand(2, 3, 9, 16)
    x, layout = model.tokenize(images)
    assert layout.grid == (5, 8)
    expected = model.patch_embed.proj(padded(images, (10, 16))).flatten(2).mT
    torch.testing.assert_close(x, expected)
    found = model.patch_embed.pick_positions(model.pos_embed[:, 1:], (10, 14), layout)
    torch.testing.assert_close(
        found, resample_abs_pos_embed(model.pos_embed[:, 1:], [5, 8], [10, 14], num_prefix_tokens=0)
    )


def test_oblong_patches_and_a_normed_projection_work():
    proj, norm = nn.Conv2d(3, 8, (2, 4), stride=(2, 4)), nn.LayerNorm(8)
    nn.init.normal_(norm.weight)
    images = torch.rand(2, 3, 12, 16)
    whole, layout = Charm(proj, norm, (12, 16), budget=24)(images)
    expected = norm(proj(images).flatten(2).mT)
    torch.testing.assert_close(whole, expected)
    mixed, layout = Charm(proj, norm, (12, 16), budget=15)(images)
    assert layout.grid == (6, 4)
    for b, i in (layout.scale_id == 1).nonzero().tolist():
        row, col = (layout.coords[b, i] * torch.tensor([6, 4])).long()
        torch.testing.assert_close(mixed[b, i], expected[b, row * 4 + col])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("size", [(20, 28), (21, 13), (64, 50), (4, 90), (3, 3)])
def test_tokens_never_exceed_the_budget(setting, size):
    charm = pixels(**setting)
    for training in (True, False):
        x, layout = charm.train(training)(torch.rand(2, 1, *size))
        assert x.shape[1] <= setting["budget"]
        assert x.shape[1] == charm.plan(size).num_tokens
        if layout.scale_id is not None:
            assert layout.scale_id.shape == x.shape[:2]


@pytest.mark.parametrize("setting", [*SETTINGS, {"budget": 70, "scales": 4}])
def test_cells_partition_the_padded_image(setting):
    charm = pixels(**setting)
    for training in (True, False):
        charm.train(training)
        images = torch.rand(3, 1, 40, 56)
        plan = charm.plan((40, 56))
        chosen = charm._choose(F.interpolate(images, size=plan.padded), plan)
        assert [c.shape[1] for c in chosen] == list(plan.counts)
        every = torch.cat(chosen, dim=1)
        assert torch.equal(every.sort(dim=1).values, torch.arange(plan.cells[0] * plan.cells[1]).expand(3, -1))
        for cells in chosen:
            assert (cells.diff(dim=1) > 0).all()


@pytest.mark.parametrize("scales", [2, 3])
def test_every_pixel_is_shown_exactly_once(scales):
    charm = pixels(budget=130, scales=scales)
    _, layout = charm(torch.rand(2, 1, 24, 32))
    plan = charm.plan((24, 32))
    assert not plan.dropped_share
    # the areas of the tokens cover the padded image once: count them on its finest common raster
    fine = 12
    area = torch.zeros(2, plan.cells[0] * fine, plan.cells[1] * fine)
    for b in range(2):
        for (y, x), scale in zip(layout.coords[b].tolist(), layout.scale_id[b].tolist()):
            step = fine // charm.sides[scale]
            top, left = (int(c * n * charm.sides[scale]) * step for c, n in zip((y, x), plan.cells))
            area[b, top : top + step, left : left + step] += 1
    assert (area == 1).all()


def test_without_a_high_cell_the_patches_are_those_of_the_downscaled_image():
    charm = pixels(budget=7, shrink_above=1.0)
    images = torch.rand(2, 1, 8, 12)
    # ⌊(7/2)/4⌋ = 0 cells at full resolution, 2×3 cells
    x, layout = charm(images)
    small = F.interpolate(images, size=(4, 6), mode="bicubic", antialias=True)
    for found, wanted in zip(x, patches_of(small)):
        torch.testing.assert_close(as_set(found), as_set(wanted), atol=1e-6, rtol=0)
    assert (layout.scale_id == 0).all()


def test_high_cells_show_the_pixels_themselves_in_the_documented_order():
    charm = pixels(budget=20)
    images = torch.rand(1, 1, 16, 24)
    x, layout = charm(images)
    plan = charm.plan((16, 24))
    assert plan.counts == (22, 2)
    assert plan.kept_coarse == 12
    grid = patches_of(images)[0].reshape(8, 12, -1)
    high = [i for i, s in enumerate(layout.scale_id[0].tolist()) if s == 1]
    assert high == list(range(12, 20))
    for i in high:
        row, col = (layout.coords[0, i] * torch.tensor([8, 12])).long()
        torch.testing.assert_close(x[0, i], grid[row, col])
    low = patches_of(F.interpolate(images, size=(8, 12), mode="bicubic", antialias=True))[0].reshape(4, 6, -1)
    for i in range(12):
        row, col = (layout.coords[0, i] * torch.tensor([4, 6])).long()
        torch.testing.assert_close(x[0, i], low[row, col])
    cell = (layout.coords[0] * torch.tensor([4.0, 6.0])).long() @ torch.tensor([6, 1])
    assert (cell[:12].diff() > 0).all()
    assert (cell[12:].diff() >= 0).all()


@pytest.mark.parametrize("setting", SETTINGS)
def test_positions_are_the_interpolated_table_at_the_right_index(setting):
    model, _ = host(charm=setting)
    charm = model.patch_embed
    _, layout = model.tokenize(torch.rand(2, 3, 24, 40))
    table = torch.randn(1, 140, 16)
    found = charm.pick_positions(table, (10, 14), layout)
    cells = charm.plan((24, 40)).cells
    for b in range(2):
        for i, ((y, x), scale) in enumerate(zip(layout.coords[b].tolist(), layout.scale_id[b].tolist())):
            grid = [n * charm.sides[scale] for n in cells]
            own = resample_abs_pos_embed(table, grid, [10, 14], num_prefix_tokens=0)[0]
            index = int(y * grid[0]) * grid[1] + int(x * grid[1])
            torch.testing.assert_close(found[b, i], own[index] + charm.scale_embed[scale])


@pytest.mark.parametrize("setting", [*SETTINGS, {"budget": 12}])
def test_source_says_which_token_shows_a_patch(setting):
    charm = pixels(**setting)
    x, layout = charm(torch.rand(2, 1, 24, 40))
    h, w = layout.grid
    assert layout.source.shape == (2, h * w)
    kept = layout.source >= 0
    assert bool(kept.all()) is (charm.plan((24, 40)).dropped_share == 0)
    for b in range(2):
        for j, row in enumerate(layout.source[b].tolist()):
            if row < 0:
                continue
            scale = int(layout.scale_id[b, row])
            grid = torch.tensor([n * charm.sides[scale] for n in charm.plan((24, 40)).cells])
            centre = torch.tensor([(j // w + 0.5) / h, (j % w + 0.5) / w])
            assert torch.equal((centre * grid).long(), (layout.coords[b, row] * grid).long())
        # every token shows some patch
        assert set(layout.source[b].tolist()) - {-1} == set(range(x.shape[1]))


def test_batches_of_different_sizes_work_through_valid():
    model, _ = host(charm={"budget": 24})
    model.eval()
    images = [torch.rand(3, *size) for size in ((6, 8), (20, 28), (33, 21), (10, 9))]
    x, layout = model.tokenize(images)
    lengths = [model.patch_embed.plan(tuple(i.shape[-2:])).num_tokens for i in images]
    assert lengths == layout.valid.sum(1).tolist()
    assert x.shape[:2] == (4, max(lengths))
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-5, rtol=1e-5)
    # what stands in the padding is without effect
    tokens, layout = model.embed(images)
    noisy = tokens.clone()
    noisy[:, 1:][~layout.valid] = 7.0
    torch.testing.assert_close(
        model.readout(*model.run(noisy, layout)), model.readout(*model.run(tokens, layout)), atol=1e-5, rtol=1e-5
    )


def test_a_list_of_one_size_is_the_batch():
    model, _ = host(charm={"budget": 24})
    model.eval()
    images = torch.rand(3, 3, 20, 28)
    torch.testing.assert_close(model(list(images)), model(images), atol=1e-5, rtol=1e-5)


def test_mean_pooling_leaves_padding_out():
    model, _ = host(charm={"budget": 24}, class_token=False, global_pool="avg")
    model.eval()
    images = [torch.rand(3, 6, 8), torch.rand(3, 20, 28)]
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-5, rtol=1e-5)


def test_the_encoder_sees_padding_only_when_asked():
    model, _ = host(charm={"budget": 24, "see_padding": True})
    images = [torch.rand(3, 6, 8), torch.rand(3, 20, 28)]
    tokens, layout = model.tokenize(images)
    assert layout.valid is None
    assert torch.equal(tokens[0, 12:], model.patch_embed.mask_token.expand(tokens.shape[1] - 12, -1))
    model(images).sum().backward()
    assert model.patch_embed.mask_token.grad.abs().sum() > 0
    assert host(charm={"budget": 24})[0].patch_embed.mask_token is None


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_draws_anew_and_follows_torchs_generator(setting):
    charm = pixels(**setting).train()
    images = torch.rand(1, 1, 40, 56).expand(4, -1, -1, -1)
    torch.manual_seed(1)
    first, second = charm(images)[1].coords, charm(images)[1].coords
    assert not torch.equal(first, second)
    # images of one batch get draws of their own
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(1)
    assert torch.equal(charm(images)[1].coords, first)


@pytest.mark.parametrize("setting", SETTINGS)
def test_evaluation_is_fixed_and_does_not_touch_the_generator(setting):
    charm = pixels(**setting)
    images = torch.rand(3, 1, 40, 56)
    state = torch.get_rng_state()
    x, layout = charm(images)
    again, _ = charm(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, again)
    alone, _ = charm(images[1:2])
    torch.testing.assert_close(alone[0], x[1])
    if charm.select == "random":
        assert torch.equal(layout.coords[0], layout.coords[1])
    charm.draw = 1
    assert not torch.equal(charm(images)[1].coords, layout.coords)


def test_draws_of_evaluation_choose_every_cell_equally_often():
    charm = pixels(budget=40)
    plan = charm.plan((16, 24))
    hits = torch.zeros(24)
    for charm.draw in range(600):
        hits[charm._choose(torch.zeros(1, 1, 16, 24), plan)[1][0]] += 1
    expected = 600 * plan.counts[1] / 24
    assert (hits - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("select", ["frequency", "gradient", "entropy"])
def test_informed_selection_draws_from_the_best_cells(select, training):
    charm = pixels(budget=20, select=select).train(training)
    images = torch.full((2, 1, 16, 24), 0.5)
    # 2 cells of 4×6 are kept; give detail to 4
    busy = {3, 8, 16, 23}
    for cell in busy:
        row, col = cell // 6 * 4, cell % 6 * 4
        images[:, :, row : row + 4, col : col + 4] = torch.rand(4, 4)
    seen = set()
    for charm.draw in range(30):
        chosen = charm._choose(images, charm.plan((16, 24)))[1]
        assert set(chosen.flatten().tolist()) <= busy
        seen |= set(chosen.flatten().tolist())
    assert seen == busy


def test_informed_intermediate_scales_take_the_next_ranks():
    charm = pixels(budget=100, scales=3, select="gradient", shrink_above=1.0)
    plan = charm.plan((48, 64))
    assert plan.counts[2] == 2
    assert plan.counts[1] == 3
    scores = torch.arange(48.0).flip(0)[None]
    charm._scores = lambda images, plan: scores
    for charm.draw in range(20):
        _, middle, high = charm._choose(torch.zeros(1, 1, 48, 64), plan)
        assert high.max() < 4
        assert middle.min() >= 6
        assert middle.max() < 12


def test_saliency_draws_above_half_the_largest_mask_sum():
    def mask(images):
        found = torch.zeros(len(images), *images.shape[-2:])
        found[:, :4, :4] = 1.0
        found[:, 4:8, 4:8] = 0.6
        found[:, 12:, 20:] = 0.4
        return found

    charm = pixels(budget=20, select="saliency", saliency=mask)
    for charm.draw in range(10):
        high = charm._choose(torch.zeros(2, 1, 16, 24), charm.plan((16, 24)))[1]
        assert (high == torch.tensor([0, 7])).all()
    charm = pixels(budget=28, select="saliency", saliency=mask)
    # three are needed, two qualify: the next best joins
    high = charm._choose(torch.zeros(1, 1, 16, 24), charm.plan((16, 24)))[1]
    assert high[0].tolist() == [0, 7, 23]


def test_average_draws_is_the_mean_over_draws():
    model, _ = host(charm={"budget": 24, "eval_repeats": 3})
    model.eval()
    images = torch.rand(2, 3, 20, 28)
    outputs = []
    for model.patch_embed.draw in range(3):
        outputs.append(model(images))
    model.patch_embed.draw = 0
    mean = average_draws(model, images)
    torch.testing.assert_close(mean, torch.stack(outputs).mean(0))
    assert not torch.allclose(outputs[0], outputs[1])
    assert model.patch_embed.draw == 0
    with pytest.raises(BadInput, match="eval"):
        average_draws(model.train(), images)


def test_sides_of_the_scales_and_equal_ones_are_refused():
    assert scale_sides(2, 0.5) == (1, 2)
    assert scale_sides(3, 0.5) == (2, 3, 4)
    # 0.3·2 = 0.6 rounds up to one patch
    assert scale_sides(2, 0.3) == (1, 2)
    with pytest.raises(BadInput, match=r"factor=0\.5 works"):
        scale_sides(2, 0.6)
    for scales in (2, 3, 4, 5):
        assert len(set(scale_sides(scales, 0.5))) == scales


def test_the_plan_reports_and_limits_what_is_dropped():
    proj = nn.Conv2d(3, 4, 14, stride=14)
    full = Charm(proj, None, (224, 224), budget=512, shrink_above=1.0).plan((1024, 768))
    assert full.dropped_share > 0.7
    assert full.padded == (1036, 756)
    shrunk = Charm(proj, None, (224, 224), budget=512).plan((1024, 768))
    assert shrunk.dropped_share <= 0.7
    assert shrunk.size < full.size
    charm = pixels(budget=16)
    x, layout = charm(torch.rand(1, 1, 100, 100))
    assert charm.plan((100, 100)).size < (100, 100)
    assert x.shape[1] <= 16
    assert layout.source.shape[1] == layout.grid[0] * layout.grid[1]


@pytest.mark.parametrize("size", [(4, 4), (7, 7), (5, 7), (14, 14), (9, 20), (3, 3)])
def test_the_default_budget_halves_the_tokens_and_drops_none(size):
    proj = nn.Conv2d(1, 4, 2, stride=2)
    charm = Charm(proj, None, (2 * size[0], 2 * size[1]))
    plan = charm.plan((2 * size[0], 2 * size[1]))
    assert plan.counts
    assert plan.counts[1] >= 1
    assert plan.dropped_share == 0
    assert plan.num_tokens <= charm.budget < size[0] * size[1]


@pytest.mark.parametrize("options", [{}, {"select": "entropy"}, {"budget": 12, "scales": 3}, {"budget": 6}])
def test_conforms_to_the_rules_of_parts(options):
    check_part(Charm, **options)


def test_state_dict_keeps_the_hosts_names_and_undo_restores():
    plain = tiny_vit((20, 28), 2, 3, 5, embed_dim=16, depth=2, num_heads=2).eval()
    nn.init.normal_(plain.head.weight, std=0.3)
    images = torch.rand(2, 3, 20, 28)
    before, keys, embed = plain(images), list(plain.state_dict()), plain.patch_embed
    record = swap(plain, "tokenizer", Charm, budget=24)
    assert set(plain.state_dict()) == {*keys, "patch_embed.scale_embed"}
    assert not torch.equal(plain(images), before)
    record.undo()
    assert plain.patch_embed is embed
    assert torch.equal(plain(images), before)


def test_scale_vectors_can_be_frozen_and_a_fresh_projection_asked_for():
    model, _ = host(charm={"budget": 24, "freeze_scale": True})
    assert not model.patch_embed.scale_embed.requires_grad
    plain = tiny_vit((20, 28), 2, 3, 5, embed_dim=16, num_heads=2)
    old = plain.patch_embed.proj.weight
    swap(plain, "tokenizer", Charm, warm=False)
    assert plain.patch_embed.proj.weight is not old
    assert plain.patch_embed.proj.weight.shape == old.shape


def test_compiles_as_one_graph_in_train_and_eval():
    model, _ = host(charm={"budget": 24})
    images = torch.rand(2, 3, 20, 28)
    for training in (False, True):
        model.train(training)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        out = compiled(images)
        assert out.shape == (2, 5)
        if not training:
            torch.testing.assert_close(out, model(images))


def test_pixels_get_gradients_through_every_scale():
    charm = pixels(budget=200, scales=3)
    images = torch.rand(1, 1, 24, 40, requires_grad=True)
    x, layout = charm(images)
    assert set(layout.scale_id.unique().tolist()) == {0, 1, 2}
    x.square().sum().backward()
    assert (images.grad != 0).float().mean() > 0.99


def test_wrong_options_and_inputs_are_refused():
    proj = nn.Conv2d(3, 4, 2, stride=2)
    with pytest.raises(UnknownName, match="random"):
        Charm(proj, select="rndom")
    with pytest.raises(BadInput, match="saliency"):
        Charm(proj, select="saliency")
    with pytest.raises(BadInput, match="budget=1"):
        Charm(proj, budget=1)
    with pytest.raises(BadInput, match="side by side"):
        Charm(nn.Conv2d(3, 4, 4, stride=2))
    with pytest.raises(BadInput, match="3 channels"):
        Charm(proj)(torch.rand(1, 1, 8, 8))
    with pytest.raises(BadInput, match="empty"):
        Charm(proj)([])
    with pytest.raises(BadInput, match="itself"):
        Charm(proj).pick_positions(torch.zeros(1, 4, 4), (2, 2), TokenLayout(grid=(2, 2)))
    model, _ = host()
    with pytest.raises(BadInput, match="undo"):
        swap(model, "tokenizer", Charm)


def test_the_fixed_draw_is_arranged_once_and_follows_weights_and_settings(monkeypatch):
    model, _ = host(charm={"budget": 24})
    model.eval()
    charm, images = model.patch_embed, torch.rand(3, 3, 20, 28)
    with torch.inference_mode():
        first = model(images)
    calls = []
    choose = charm._choose
    monkeypatch.setattr(charm, "_choose", lambda *a: calls.append(1) or choose(*a))
    assert torch.equal(model(images), first)
    assert not calls
    # new weights count at once
    other, _ = host(charm={"budget": 24}, seed=9)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(images), other.eval()(images))
    assert not calls
    # so do another draw and another size
    charm.draw = 1
    assert not torch.equal(model(images), other(images))
    model(torch.rand(1, 3, 24, 30))
    assert len(calls) == 2
    # what inference mode prepared serves in training, which draws anew
    charm.draw = 0
    model(images).sum().backward()
    assert charm.scale_embed.grad.abs().sum() > 0
    model.train()(images)
    assert len(calls) == 3
    torch.testing.assert_close(copy.deepcopy(model).eval()(images), other(images))


def test_an_export_leaves_nothing_behind():
    model, _ = host(charm={"budget": 24})
    model.eval()
    images = torch.rand(2, 3, 20, 28)
    torch.export.export(model, (images,), strict=False)
    out = model(images)
    assert type(out) is torch.Tensor
    assert out.isfinite().all()


def test_a_fixed_draw_and_an_empty_batch():
    model, _ = host(charm={"budget": 24})
    assert model.eval()(torch.rand(0, 3, 20, 28)).shape == (0, 5)
