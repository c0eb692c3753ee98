from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.compress.merge.matching import best_edges, bipartite_match, merge_rows, plan_merges, spread, target_of
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout


def naive_match(metric: torch.Tensor, valid: torch.Tensor, first: int) -> list[list[tuple[float, int]]]:
    """One image and one token at a time."""
    found = []
    for rows, ok in zip(metric.double(), valid):
        per_image = []
        b_rows = [i for i in range(len(rows)) if i % 2 != first]
        for a in range(first, len(rows), 2):
            best, at = -math.inf, 0
            for place, b in enumerate(b_rows):
                if ok[a] and ok[b]:
                    cos = float(torch.dot(rows[a], rows[b]) / (rows[a].norm() * rows[b].norm()))
                    if cos > best:
                        best, at = cos, place
            per_image.append((best, at))
        found.append(per_image)
    return found


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 13), first=st.sampled_from([0, 1]), seed=st.integers(0, 99), padded=st.booleans())
def test_matching_agrees_with_a_loop_over_pairs(n, first, seed, padded):
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(3, n, 5, generator=generator)
    valid = torch.ones(3, n, dtype=torch.bool)
    if padded:
        valid[0, max(1, n - 3) :] = False
        valid[1, ::3] = False
    score, partner = bipartite_match(metric, valid if padded else None, first)
    for image, expected in enumerate(naive_match(metric, valid, first)):
        for a, (best, at) in enumerate(expected):
            if math.isinf(best):
                assert score[image, a] == -math.inf
            else:
                assert score[image, a].item() == pytest.approx(best, abs=2e-6)
                assert partner[image, a] == at


def test_parallel_keys_score_one_and_no_more():
    key = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(3))
    metric = key * torch.rand(200, 12, 1, generator=torch.Generator().manual_seed(4)).add(0.1)
    score, partner = bipartite_match(metric)
    assert (score == 1.0).all()
    assert (partner == 0).all(), "equal scores go to the first partner"


def test_ties_do_not_depend_on_padding_or_batch():
    generator = torch.Generator().manual_seed(0)
    few_kinds = torch.randn(3, 48, generator=generator)
    metric = few_kinds[torch.randint(0, 3, (21,), generator=generator)][None]
    alone = bipartite_match(metric)
    padded = torch.cat([torch.cat([metric, torch.randn(1, 9, 48)], dim=1), torch.randn(4, 30, 48)])
    valid = torch.ones(5, 30, dtype=torch.bool)
    valid[0, 21:] = False
    score, partner = bipartite_match(padded, valid)
    assert torch.equal(alone[0][0], score[0, :11])
    assert torch.equal(alone[1][0], partner[0, :11])


def test_matching_is_as_sharp_under_autocast():
    metric = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    plain = bipartite_match(metric)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = bipartite_match(metric)
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[1], mixed[1])


def test_best_edges_takes_the_earlier_of_equals():
    score = torch.tensor([[0.5, 0.9, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]])
    assert best_edges(score, 2).tolist() == [[True, True, False, False], [False, False, True, True]]
    each = best_edges(score, torch.tensor([3, 0]))
    assert each.tolist() == [[True, True, True, False], [False] * 4]
    assert not best_edges(score, 0).any()


def naive_merge(x, sizes, valid, groups, merged, partner, first):
    """Rows and the sets of patches they hold, one image at a time; weights are the patch counts."""
    a_rows, b_rows = list(range(first, len(x), 2)), list(range(1 - first, len(x), 2))
    out = [(x[a], {*groups[a]}, sizes[a]) for place, a in enumerate(a_rows) if valid[a] and not merged[place]]
    for place, b in enumerate(b_rows):
        if not valid[b]:
            continue
        members = [b, *(a for i, a in enumerate(a_rows) if merged[i] and partner[i] == place)]
        total = sum(sizes[m] for m in members)
        mean = sum(x[m] * sizes[m] for m in members) / total
        out.append((mean, set().union(*(groups[m] for m in members)), total))
    return out


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(2, 12),
    prefix=st.sampled_from([0, 1, 2, 5]),
    seed=st.integers(0, 99),
    padded=st.booleans(),
    again=st.booleans(),
)
def test_merging_agrees_with_a_loop_over_groups(n, prefix, seed, padded, again):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, prefix + n, 3, generator=generator, dtype=torch.float64)
    first = prefix % 2
    layout = TokenLayout(grid=(1, n), prefix=(("class", prefix),))
    groups = [[{j} for j in range(n)] for _ in range(2)]
    if padded:
        valid = torch.ones(2, n, dtype=torch.bool)
        valid[0, max(2, n - 2) :] = False
        layout = layout.replace(valid=valid)
    for _ in range(2 if again else 1):
        rows = x[:, prefix:]
        if rows.shape[1] < 2:
            break
        valid = layout.valid if layout.valid is not None else torch.ones(rows.shape[:2], dtype=torch.bool)
        sizes = layout.sizes if layout.sizes is not None else torch.ones(rows.shape[:2])
        score, partner = bipartite_match(rows, layout.valid, first)
        merged = (torch.rand(score.shape, generator=generator) < 0.5) & score.isfinite()
        expected = [
            naive_merge(rows[i], sizes[i].tolist(), valid[i], groups[i], merged[i], partner[i], first) for i in range(2)
        ]
        heads = x[:, :prefix]
        x, layout = merge_rows(x, layout, merged, partner, first)
        assert torch.equal(x[:, :prefix], heads)
        longest = max(len(e) for e in expected)
        assert x.shape[1] == prefix + longest
        for i, image in enumerate(expected):
            for place, (mean, patches, size) in enumerate(image):
                torch.testing.assert_close(x[i, prefix + place], mean, rtol=1e-6, atol=1e-6)
                assert layout.sizes[i, place] == size
                assert {j for j in range(n) if layout.source[i, j] == place} == patches
                assert layout.valid is None or layout.valid[i, place]
            if layout.valid is not None:
                assert not layout.valid[i, len(image) :].any()
            else:
                assert len(image) == longest
        groups = [[e[1] for e in image] + [set()] * (longest - len(image)) for image in expected]


def test_merged_coordinates_are_centres_of_mass():
    layout = TokenLayout(grid=(1, 4))
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    merged, partner = torch.tensor([[True, True]]), torch.tensor([[0, 0]])
    out, new = merge_rows(x, layout, merged, partner, 0)
    assert out.flatten().tolist() == [2.0, 4.0]
    assert new.sizes.tolist() == [[3.0, 1.0]]
    torch.testing.assert_close(new.coords[0, :, 1], torch.tensor([(0.125 + 0.375 + 0.625) / 3, 0.875]))
    assert new.unmerge(out).flatten().tolist() == [2.0, 2.0, 2.0, 4.0]


@given(
    n=st.integers(1, 300),
    depth=st.integers(1, 12),
    share=st.floats(0, 1),
    schedule=st.sampled_from(["constant", "linear", "decreasing"]),
)
def test_plans_reach_their_target_and_never_more_than_halve(n, depth, share, schedule):
    lowest = math.ceil(n / 2**depth)
    target = lowest + round(share * (n - lowest))
    plan = plan_merges(n, target, depth, schedule)
    assert len(plan) == depth
    assert sum(plan) == n - target
    for merges in plan:
        assert 0 <= merges <= n // 2
        n -= merges


def test_plans_follow_their_schedule():
    assert plan_merges(100, 60, 4) == [10, 10, 10, 10]
    assert plan_merges(100, 58, 4) == [11, 11, 10, 10], "the remainder goes to the first blocks"
    rising = plan_merges(100, 60, 4, "linear")
    assert rising == sorted(rising)
    assert plan_merges(100, 60, 4, "decreasing") == rising[::-1]
    assert spread(8, 12) == [8] * 12
    assert spread(8, 12, "decreasing")[0] == 16
    assert spread(8, 12, "decreasing")[-1] == 0


def test_impossible_plans_say_what_is_possible():
    with pytest.raises(BadInput, match="4 to 64"):
        plan_merges(64, 3, 4)
    with pytest.raises(BadInput, match="4 to 64"):
        plan_merges(64, 65, 4)
    with pytest.raises(BadInput, match="constant, linear, decreasing"):
        plan_merges(64, 32, 4, "quadratic")
    with pytest.raises(BadInput, match="give one"):
        target_of(64, 4, 10, 0.5)
    with pytest.raises(BadInput, match="ratio=1"):
        target_of(64, 4, None, 1.0)
    assert target_of(64, 1, None, None) == 32


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_layout_is_what_regrouping_gives(padded, prefix):
    """Sizes, centres and source by the layout's own rule, after two merges and with a patch that was dropped."""
    n, generator = 11, torch.Generator().manual_seed(prefix)
    x = torch.randn(3, prefix + n, 4, generator=generator)
    layout = TokenLayout(grid=(2, 6), prefix=(("class", prefix),)).take(torch.arange(n).expand(3, -1))
    if padded:
        valid = torch.ones(3, n, dtype=torch.bool)
        valid[1, 8:] = False
        layout = layout.replace(valid=valid)
    for known in (True, False):
        first, rows = prefix % 2, x.shape[1] - prefix
        score, partner = bipartite_match(x[:, prefix:], layout.valid, first)
        merged = best_edges(score, 2) if known else (score > 0)
        merged = merged & score.isfinite()
        old = layout
        x, layout = merge_rows(x, layout, merged, partner, first, rows - 2 if known else None)
        # where each old row went, read off the source maps of patches that are still there
        assign = torch.full((3, rows), -1)
        for image in range(3):
            for patch in range(12):
                at = int(old.source[image, patch])
                if at >= 0:
                    assign[image, at] = layout.source[image, patch]
        expected = old.replace(valid=None).regroup(assign, x.shape[1] - prefix)
        torch.testing.assert_close(layout.coords, expected.coords)
        for name in ("sizes", "source"):
            assert torch.equal(getattr(layout, name), getattr(expected, name))
            assert getattr(layout, name).dtype == getattr(expected, name).dtype
        assert (layout.source[:, 11] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_pass_through_the_means_and_not_through_sizes(dtype):
    x = torch.randn(2, 1 + 6, 3, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    layout = TokenLayout(grid=(2, 3), prefix=(("class", 1),))
    score, partner = bipartite_match(x[:, 1:].detach(), None, 1)
    out, after = merge_rows(x, layout, best_edges(score, 2), partner, 1, 4)
    assert not after.sizes.requires_grad and not after.coords.requires_grad
    assert after.sizes.dtype == after.coords.dtype == torch.float32
    out.sum().backward()
    share = 1 / after.unmerge(after.sizes)
    torch.testing.assert_close(x.grad[:, 1:], share.to(dtype).unsqueeze(-1).expand(-1, -1, 3))
    assert torch.equal(x.grad[:, 0], torch.ones(2, 3, dtype=dtype))
