"""PointDGMamba: masked tokens, orders, pairs, plain PointMamba as a limit, and timm's contract."""

from __future__ import annotations

import pytest
import timm
import torch

import vitkit  # noqa: F401 - registers the networks
from vitkit.errors import BadInput, UnknownName
from vitkit.models.backbones.point_dg_mamba import Denoise, SequenceMamba, join_states, split_states
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.vim import Vim
from vitkit.models.point_order import point_order
from vitkit.models.vit import collect_aux
from vitkit.testing import check_backbone
from vitkit.train.optimizers.choose import param_groups

TINY = {"embed_dim": 16, "depth": 2, "groups": 10, "neighbours": 6, "point_width": 4, "d_state": 3, "num_classes": 4}


def tiny(**options):
    torch.manual_seed(0)
    return timm.create_model("point_dg_mamba_femto", **{**TINY, **options}).eval()


def clouds(batch=3, n=40, seed=1):
    return torch.randn(batch, n, 3, generator=torch.Generator().manual_seed(seed))


def with_mask(model, inputs, masked):
    """The tokens of ``inputs`` with ``masked`` (B, G) in place of the decision of the network."""
    tokens = model.tokenise(inputs)
    return tokens._replace(keep=(~masked).to(tokens.x.dtype))


def some_masked(batch=3, num=10):
    masked = torch.zeros(batch, num, dtype=torch.bool)
    masked[0, [2, 3]] = True
    masked[1, [0, 9]] = True
    return masked


@pytest.mark.parametrize(("chans", "size"), [(1, 28), (3, 32), (5, 8)])
def test_timms_contract(chans, size):
    name = "point_dg_mamba_femto"
    assert "reset_classifier" in check_backbone(name, image_size=size, in_chans=chans, img_size=size).passed


def test_the_big_one():
    with torch.device("meta"):
        model = timm.create_model("point_dg_mamba", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(13.1, abs=0.1)
    assert len(model.stages) == 12 and model.num_features == 384 and model.num_points == 1024


# -- the mixer ---------------------------------------------------------------------------------------------------------


def test_the_mixer_is_vims():
    mixer, vim = SequenceMamba(12, d_state=3), Vim(12, d_state=3, num_prefix=0)
    vim.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 9, 12)
    assert torch.allclose(mixer(x), vim(x, TokenLayout(grid=(1, 9))), atol=1e-6)


def test_masked_steps_pass_the_state_and_are_zeros_to_the_convolution():
    """The equation, step by step, for one sequence in both directions."""
    mixer = SequenceMamba(6, d_state=3).double()
    x, still = torch.randn(1, 8, 6).double(), torch.zeros(1, 8, dtype=torch.bool)
    still[0, [0, 3, 4]] = True
    inner, states = mixer.out_proj.in_features, 3
    u, z = mixer.in_proj(x[0]).chunk(2, -1)
    total = torch.zeros(8, inner).double()
    for k, order in enumerate((range(8), reversed(range(8)))):
        weight = mixer.conv.weight[:, k * inner : (k + 1) * inner]
        bias = mixer.conv.bias[k * inner : (k + 1) * inner]
        a_rate = -mixer.ssm.A_log[k].exp()
        h, past = torch.zeros(inner, states).double(), [torch.zeros(inner).double()] * 3
        for t in order:
            now = torch.zeros(inner).double() if still[0, t] else u[t]
            past = [now, *past[:3]]
            c = torch.zeros(inner).double() if still[0, t] else bias + sum(w * p for w, p in zip(weight, past))
            v = torch.nn.functional.silu(c)
            r, b_in, c_out = (mixer.ssm.x_proj[k] @ v).split(mixer.ssm.sizes)
            step = torch.nn.functional.softplus(mixer.ssm.dt_proj[k] @ r + mixer.ssm.dt_bias[k])
            if not still[0, t]:
                h = (step[:, None] * a_rate).exp() * h + (step * v)[:, None] * b_in
            total[t] += h @ c_out + mixer.ssm.D[k] * v
    expected = mixer.out_proj(total * torch.nn.functional.silu(z))
    assert torch.allclose(mixer(x, still)[0], expected, atol=1e-10)


# -- masked sequence denoising -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["concat", "average"])
def test_a_masked_token_changes_nothing_else_to_the_bit(combine):
    model, masked = tiny(combine=combine), some_masked()
    tokens = with_mask(model, clouds(), masked)
    other = tokens._replace(x=torch.where(masked.unsqueeze(2), 100 * torch.randn_like(tokens.x), tokens.x))
    plain, changed = (model.scan(model.serialise(t)) for t in (tokens, other))
    kept = ~masked
    a, b = (model._restore(state) for state in (plain, changed))
    assert torch.equal(a[kept], b[kept]) and not torch.equal(a[masked], b[masked])
    assert torch.equal(model.features(plain), model.features(changed))
    assert torch.equal(*(model.forward_head(model.features(state)) for state in (plain, changed)))


def test_a_masked_token_is_still_in_every_order():
    model, masked = tiny(), some_masked()
    state = model.serialise(with_mask(model, clouds(), masked))
    assert state.still.shape == (3, 1, 30) and state.still.sum().item() == 3 * masked.sum().item()
    for k in range(3):
        still = state.still[:, 0, 10 * k : 10 * (k + 1)]
        assert torch.equal(still.gather(1, state.places[:, k]), masked)


def test_the_mean_is_over_the_tokens_kept():
    model, masked = tiny(), some_masked()
    state = model.scan(model.serialise(with_mask(model, clouds(), masked)))
    rows = model.norm(model._restore(state))
    pooled = model.forward_head(model.features(state), pre_logits=True)
    for b in range(3):
        assert torch.allclose(pooled[b], rows[b][~masked[b]].mean(0), atol=1e-5)


def test_at_most_a_fifth_is_masked_and_the_lowest_scores_first():
    denoise = Denoise(6, max_masked=0.2)
    x, centres, density = torch.randn(4, 20, 6), torch.randn(4, 20, 3), torch.randn(4, 20)
    masked, m = denoise(x, centres, density)
    assert not masked.any() and bool((m > 0.5).all())
    torch.nn.init.constant_(denoise.score[2].bias, -1.0)
    torch.nn.init.normal_(denoise.score[2].weight, std=5.0)
    masked, m = denoise(x, centres, density)
    for row, score in zip(masked, m):
        low = int((score < 0.5).sum())
        assert int(row.sum()) == min(low, 4)
        assert set(row.nonzero().flatten().tolist()) <= set(score.argsort()[:4].tolist())
    assert bool((masked.sum(1) == 4).any())
    assert not Denoise(6, max_masked=0.04)(x, centres, density)[0].any()


def test_the_score_sees_token_density_and_likeness():
    denoise = Denoise(6, neighbours=3)
    x, centres, density = torch.randn(1, 8, 6), torch.randn(1, 8, 3), torch.randn(1, 8)
    gaps = torch.cdist(centres[0], centres[0])
    for i, score in enumerate(denoise(x, centres, density)[1][0]):
        near = gaps[i].argsort()[1:4]
        alike = torch.nn.functional.cosine_similarity(x[0, near], x[0, i], dim=1).mean()
        seen = torch.cat([x[0, i], density[0, i : i + 1], alike[None]])
        assert torch.allclose(score, denoise.score(seen).sigmoid()[0], atol=1e-5)


def lean(model):
    """A network whose scores of :func:`clouds` are spread around one half."""
    last, scores = model.denoise.score[2], []
    torch.nn.init.normal_(last.weight, std=5.0)
    hook = model.denoise.register_forward_hook(lambda _, __, out: scores.append(out[1]))
    with torch.no_grad():
        model.tokenise(clouds())
        last.bias.sub_(scores[0].logit().median())
    hook.remove()
    return model


def test_the_mask_is_hard_and_has_the_gradient_of_the_score():
    model = lean(tiny())
    tokens = model.tokenise(clouds())
    assert set(tokens.keep.unique().tolist()) == {0.0, 1.0} and bool((tokens.keep.sum(1) >= 8).all())
    scores = []
    model.denoise.register_forward_hook(lambda _, __, out: scores.append(out[1]))
    keep = model.tokenise(clouds()).keep
    scores[0].retain_grad()
    (keep * torch.arange(30.0).view(3, 10)).sum().backward()
    assert torch.equal(scores[0].grad, torch.arange(30.0).view(3, 10))
    # a masked token's score learns by what the token would add to the mean
    model.zero_grad()
    scores.clear()
    state = model.begin(clouds())
    scores[0].retain_grad()
    logits = model.forward_head(model.features(model.scan(state)))
    logits[:, 0].sum().backward()
    masked = state.keep < 0.5
    assert masked.any() and bool((scores[0].grad[masked] != 0).all())


def test_the_loss_on_the_scores_is_in_aux():
    model = lean(tiny())
    scores = []
    model.denoise.register_forward_hook(lambda _, __, out: scores.append(out[1]))
    with collect_aux(model) as aux:
        model(clouds())
    assert set(aux) == {("mask", 0)}
    assert torch.allclose(aux["mask", 0], 0.1 * (scores[0].mean() - 0.9) ** 2)
    with collect_aux(tiny(max_masked=0)) as aux:
        tiny(max_masked=0)(clouds())
    assert not aux


# -- sequences ---------------------------------------------------------------------------------------------------------


def test_without_masking_it_is_point_mamba_in_both_directions():
    """Tokens in K orders with scale and shift, Vim layers with residuals, mean over places, norm, mean, head."""
    model = tiny(max_masked=0)
    torch.nn.init.normal_(model.order_scale)
    torch.nn.init.normal_(model.order_shift)
    groups = model.stem(clouds())
    for b in range(3):
        tokens, centres = groups.x[b] + groups.position[b], groups.centres[b : b + 1]
        orders = [point_order(centres, kind)[0] for kind in ("hilbert", "xyz", "zyx")]
        x = torch.cat([tokens[o] * model.order_scale[k] + model.order_shift[k] for k, o in enumerate(orders)])
        for block in model.stages:
            vim = Vim(16, d_state=3, num_prefix=0)
            vim.load_state_dict(block.mixer.state_dict())
            x = x + vim(block.norm(x)[None], TokenLayout(grid=(1, 30)))[0]
        back = torch.stack([x[10 * k : 10 * (k + 1)][o.argsort()] for k, o in enumerate(orders)]).mean(0)
        assert torch.allclose(model.head(model.norm(back).mean(0)), model(clouds())[b], atol=1e-5)


def test_averaging_scans_every_order_alone():
    model = tiny(combine="average", max_masked=0)
    tokens = model.tokenise(clouds())
    together = model._restore(model.scan(model.serialise(tokens)))
    alone = []
    for k, kind in enumerate(model.orders):
        one = tiny(orders=(kind,), max_masked=0)
        mine = {name: getattr(model, name)[k : k + 1] for name in ("order_scale", "order_shift")}
        one.load_state_dict({**model.state_dict(), **mine})
        alone.append(one._restore(one.scan(one.serialise(tokens))))
    assert torch.allclose(together, torch.stack(alone).mean(0), atol=1e-5)


def test_tokens_are_in_canonical_order():
    model = tiny()
    tokens = model.tokenise(clouds())
    assert torch.equal(point_order(tokens.centres, "hilbert"), torch.arange(10).expand(3, -1))
    state = model.serialise(tokens)
    assert torch.equal(state.places[:, 0], torch.arange(10).expand(3, -1))
    assert torch.allclose(model._restore(state), tokens.x, atol=1e-6)


@pytest.mark.parametrize("how", ["sequential", "interleave"])
@pytest.mark.parametrize("combine", ["concat", "average"])
def test_pairs_are_taken_apart_again(how, combine):
    model = tiny(combine=combine)
    first = model.serialise(with_mask(model, clouds(), some_masked()))
    second = model.serialise(with_mask(model, clouds(seed=2), some_masked().flip(0)))
    joined = join_states(first, second, how)
    length = first.x.shape[2]
    assert joined.x.shape == (3, first.x.shape[1], 2 * length, 16) and joined.still.shape == joined.x.shape[:3]
    at = slice(0, None, 2) if how == "interleave" else slice(0, length)
    assert torch.equal(joined.x[:, :, at], first.x) and torch.equal(joined.still[:, :, at], first.still)
    a, b = split_states(joined, first, second, how)
    for half, whole in ((a, first), (b, second)):
        assert all(torch.equal(s, t) for s, t in zip(half[:4], whole[:4]))
    # scanned together they hear each other; masked tokens of one still do not touch the other
    a, b = model.scan_pair(first, second, how)
    assert not torch.allclose(a.x, model.scan(first).x, atol=1e-4)
    gone = second.still.unsqueeze(3)
    noisy = second._replace(x=torch.where(gone, 50 * torch.randn_like(second.x), second.x))
    c, d = model.scan_pair(first, noisy, how)
    assert torch.equal(a.x, c.x) and torch.equal(b.x.masked_fill(gone, 0), d.x.masked_fill(gone, 0))


# -- the whole network -------------------------------------------------------------------------------------------------


def test_the_order_of_the_points_does_not_matter_to_the_bit():
    model = lean(tiny())
    mixed = clouds()[:, torch.randperm(40, generator=torch.Generator().manual_seed(5))]
    with torch.no_grad():
        assert torch.equal(model(clouds()), model(mixed))
        assert torch.allclose(model(clouds())[1:2], model(clouds()[1:2]), atol=1e-5)


def test_images_and_their_points_are_one():
    model = tiny(img_size=12, in_chans=1)
    images = torch.randn(2, 1, 12, 12).requires_grad_()
    assert model.num_points == 72 and model.as_points(images).shape == (2, 72, 3)
    assert torch.equal(model(images), model(model.as_points(images)))
    model(images).square().sum().backward()
    assert int((images.grad != 0).sum()) > 50
    assert model(torch.randn(2, 1, 5, 7)).shape == (2, 4)
    assert model(clouds(2, 3)).shape == (2, 4)


def test_intermediates_are_maps_of_one_row():
    features, maps = tiny().forward_intermediates(clouds(), indices=None)
    assert features.shape == (3, 10, 16) and [tuple(m.shape) for m in maps] == [(3, 16, 1, 10)] * 2
    normed = tiny().forward_intermediates(clouds(), indices=1, norm=True, intermediates_only=True)
    assert torch.allclose(normed[0][:, :, 0].mT, features)


def test_every_parameter_learns_and_bfloat16_trains():
    for dtype in (torch.float32, torch.bfloat16):
        model = lean(tiny(drop_path_rate=0.1)).to(dtype).train()
        with collect_aux(model) as aux:
            loss = torch.nn.functional.cross_entropy(model(clouds(8).to(dtype)).float(), torch.arange(8) % 4)
        (loss + sum(aux.values())).backward()
        dead = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
        assert not dead
        assert all(bool((p.grad != 0).any()) for p in model.parameters())


def test_state_space_parameters_are_not_decayed():
    model = tiny()
    plain = {id(p) for p in param_groups(model, 0.05)[1]["params"]}
    endings = ("A_log", "ssm.D", "dt_bias", "order_scale", "order_shift")
    kept = [n for n, _ in model.named_parameters() if n.endswith(endings)]
    assert len(kept) == 8 and all(id(dict(model.named_parameters())[n]) in plain for n in kept)


def test_it_compiles_without_graph_breaks():
    torch._dynamo.reset()
    assert torch._dynamo.explain(tiny(groups=4))(clouds()).graph_break_count == 0


def test_what_is_refused():
    with pytest.raises(UnknownName, match="hilbert"):
        tiny(orders=("hilbrt",))
    with pytest.raises(BadInput, match="at least one order"):
        tiny(orders=())
    with pytest.raises(BadInput, match="concat, average"):
        tiny(combine="sum")
    with pytest.raises(BadInput, match="max_masked=1"):
        tiny(max_masked=1)
    with pytest.raises(BadInput, match="3×40×2"):
        tiny()(torch.zeros(3, 40, 2))
    with pytest.raises(BadInput, match="in_chans=2"):
        tiny()(torch.zeros(3, 2, 8, 8))
