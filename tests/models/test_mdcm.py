from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vitkit.errors import BadInput, UnknownName
from vitkit.models.labels import known_labels
from vitkit.models.mdcm import MultiScaleCues, num_kept, resize

GRIDS = [(6, 4), (3, 2), (3, 5)]
WIDTHS = [6, 10, 8]


def head(num=3, **options):
    torch.manual_seed(3)
    made = MultiScaleCues(WIDTHS[:num], 5, dim=16, num_heads=2, mlp_ratio=2.0, **options)
    for fc in made.classifiers:
        nn.init.normal_(fc.weight, std=0.5)
        nn.init.normal_(fc.bias)
    return made


def tokens(num=3, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h * w, d, generator=g) for (h, w), d in zip(GRIDS[:num], WIDTHS[:num])], GRIDS[:num]


def slow_stage(made, s, t):
    """A full self-attention layer over the class token and all tokens, read at the class token; one image and head at
    a time."""
    stage, out = made.stages[s], []
    for x in t:
        c = stage.cls_token[0]
        rows = torch.cat([stage.norm1(c), x])
        attn, d = stage.attn, 16 // 2
        q, (k, v) = attn.q(rows), attn.kv(rows).chunk(2, -1)
        z = [torch.softmax(q[:, h : h + d] @ k[:, h : h + d].T / math.sqrt(d), -1) @ v[:, h : h + d] for h in (0, d)]
        u = c + attn.proj(torch.cat(z, -1))[:1]
        out.append(stage.norm3(u + stage.mlp(stage.norm2(u)))[0])
    return torch.stack(out)


def slow_map(logits, klass):
    cue = logits[:, klass]
    return (cue - cue.min()) / (cue.max() - cue.min())


@pytest.mark.parametrize("training", [False, True])
def test_one_stage_that_keeps_all_is_its_layer_and_its_classifier(training):
    made = head(1, keep=1.0, suppress=0.0).train(training)
    x, grids = tokens(1)
    aux = {}
    z = made.read(x, grids, aux)
    expected = slow_stage(made, 0, made.stages[0].tokens(x[0]))
    torch.testing.assert_close(z[:, 0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.answer(z), made.classifiers[0](expected), atol=1e-5, rtol=1e-5)
    assert torch.equal(made.weights(z), torch.ones(3, 1))
    assert aux == {}


@pytest.mark.parametrize("score", ["logit", "entropy"])
@pytest.mark.parametrize("training", [False, True])
def test_the_walk_is_the_algorithm(training, score):
    made = head(3, score=score).train(training)
    x, grids = tokens()
    labels = torch.tensor([1, 4, 0])
    aux = {}
    z = made.read(x, grids, aux, labels)
    background, maps, own, stage_ce = 0.0, [], [], 0.0
    for s, grid in enumerate(grids):
        t = made.stages[s].tokens(x[s])
        if training and s:
            for i in range(3):
                strong = own[-1][i].flatten().clone()
                cut = strong.sort(descending=True).values[math.ceil(0.2 * len(strong)) - 1]
                strong[strong < cut] = 0
                used = resize(strong.reshape(1, *grids[s - 1]), grid).flatten()
                t = torch.cat([t[:i], (t[i] * (1 - 0.5 * used[:, None]))[None], t[i + 1 :]])
        logits = made.classifiers[s](t)
        count, rows, losses = math.ceil([0.25, 0.5, 0.75][s] * t.shape[1]), [], []
        for i in range(3):
            p = logits[i].softmax(-1)
            rank = logits[i].max(-1).values if score == "logit" else (p * p.log()).sum(-1)
            chosen = rank.argsort(descending=True)
            rows.append(t[i][chosen[:count].sort().values])
            losses.append((-math.log(5) - p[chosen[count:]].log().mean(-1)).mean())
        expected = slow_stage(made, s, torch.stack(rows))
        torch.testing.assert_close(z[:, s], expected, atol=1e-4, rtol=1e-4)
        background = background + torch.stack(losses).mean()
        answer = made.classifiers[s](expected)
        stage_ce = stage_ce + F.cross_entropy(answer, labels, label_smoothing=0.1)
        for found, classes in ((maps, labels), (own, answer.argmax(-1))):
            found.append(torch.stack([slow_map(logits[i], classes[i]).reshape(grid) for i in range(3)]).detach())
    if not training:
        assert aux == {}
        return
    alike = 0.0
    for s, t in ((0, 1), (0, 2), (1, 2)):
        a, b = resize(maps[s], grids[t]).flatten(1), maps[t].flatten(1)
        alike = alike + ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    torch.testing.assert_close(aux["mdcm_diversity", 0], 0.1 * alike, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(aux["mdcm_background", 0], 0.1 * background, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(aux["mdcm_stages", 0], stage_ce, atol=1e-4, rtol=1e-4)


def test_suppression_is_for_training_only_and_makes_a_difference_there():
    with_it, without = head(3), head(3, suppress=0.0)
    x, grids = tokens()
    assert torch.equal(with_it.eval()(x, grids), without.eval()(x, grids))
    z, other = with_it.train().read(x, grids, {}), without.train().read(x, grids, {})
    assert torch.equal(z[:, 0], other[:, 0])
    assert not torch.allclose(z[:, 1], other[:, 1])


@pytest.mark.parametrize("training", [False, True])
def test_labels_choose_losses_and_tell_the_stages_nothing(training):
    made = head(3).train(training)
    x, grids = tokens()
    # stage 0 would need no image to give the label away: it could show class k at a place of its own
    z = [made.read(x, grids, {}, labels) for labels in (None, torch.tensor([0, 1, 2]), torch.tensor([4, 2, 3]))]
    assert torch.equal(z[0], z[1]) and torch.equal(z[0], z[2])
    with known_labels(made, torch.tensor([4, 2, 3])):
        assert torch.equal(made.read(x, grids, {}), z[0])


def test_no_gradient_goes_through_the_suppression():
    made = head(2, diversity=0.0, background=0.0).train()
    x, grids = tokens(2)
    x[0].requires_grad_(True)
    z = made.read(x, grids, {})
    assert torch.autograd.grad(z[:, 1].square().sum(), x[0], retain_graph=True)[0].abs().sum() == 0
    assert torch.autograd.grad(z[:, 0].square().sum(), x[0])[0].abs().sum() > 0


def test_the_diversity_loss_has_a_gradient_to_both_stages():
    made = head(2).train()
    x, grids = tokens(2)
    for t in x:
        t.requires_grad_(True)
    aux = {}
    made.read(x, grids, aux)
    for grad in torch.autograd.grad(aux["mdcm_diversity", 0], x):
        assert grad.abs().sum() > 0


def test_the_number_of_kept_tokens_and_the_gate():
    made = head(3, keep=(0.3, 1.0, 0.01)).eval()
    x, grids = tokens()
    cues = made.cues(x, grids)
    assert [k.shape[1] for k in cues.kept] == [math.ceil(0.3 * 24), 6, 1]
    assert all(bool((k.diff(dim=1) > 0).all()) for k in cues.kept)
    torch.testing.assert_close(cues.gate.sum(1), torch.ones(3))
    torch.testing.assert_close(cues.logits, (cues.gate.unsqueeze(-1) * cues.stage_logits).sum(1))
    assert [tuple(m.shape[1:]) for m in cues.maps] == GRIDS
    assert all(m.amin().item() == 0 and m.amax().item() == 1 for m in cues.maps)
    even = head(3, gate=False).eval().cues(x, grids)
    torch.testing.assert_close(even.logits, even.stage_logits.mean(1))


@pytest.mark.parametrize(("ratio", "num", "expected"), [(0.75, 4, 3), (0.1, 30, 3), (0.25, 9, 3), (1.0, 7, 7)])
def test_kept_counts_round_up_but_not_for_what_floats_add(ratio, num, expected):
    assert num_kept(ratio, num) == expected


def test_the_class_of_a_map_is_the_label_where_it_is_known():
    made = head(2).eval()
    x, grids = tokens(2)
    answer = made.cues(x, grids)
    own = made.cues(x, grids, answer.stage_logits[:, 0].argmax(-1))
    assert torch.equal(answer.maps[0], own.maps[0])
    other = (answer.stage_logits[:, 0].argmax(-1) + 1) % 5
    assert not torch.equal(made.cues(x, grids, other).maps[0], answer.maps[0])
    made.train()
    aux = {}
    with known_labels(nn.Sequential(made), other):
        made.read(x, grids, aux)
    assert ("mdcm_stages", 0) in aux and made.labels is None
    # mixed labels weigh the losses of their classes
    mixed, apart = {}, []
    made.read(x, grids, mixed, 0.3 * F.one_hot(other, 5) + 0.7 * F.one_hot((other + 1) % 5, 5))
    for labels in (other, (other + 1) % 5):
        aux = {}
        made.read(x, grids, aux, labels)
        apart.append(aux["mdcm_stages", 0])
    torch.testing.assert_close(mixed["mdcm_stages", 0], 0.3 * apart[0] + 0.7 * apart[1])


def test_equal_tokens_are_chosen_in_their_order_whatever_the_batch():
    made = head(1, keep=0.5).eval()
    x, grids = tokens(1)
    x[0][1] = x[0][1, :1]
    cues = made.cues(x, grids)
    assert cues.kept[0][1].tolist() == list(range(12))
    assert torch.equal(made.cues([x[0][1:2]], grids).kept[0][0], cues.kept[0][1])


def test_bfloat16():
    made = head(3).bfloat16().train()
    x, grids = tokens()
    aux = {}
    z = made.read([t.bfloat16() for t in x], grids, aux, torch.tensor([0, 1, 2]))
    assert z.dtype == torch.bfloat16 and bool(z.isfinite().all())
    assert all(bool(v.isfinite()) for v in aux.values())


@pytest.mark.parametrize(
    "wrong", [{"keep": (0.5, 0.5)}, {"keep": 0.0}, {"suppress": 1.5}, {"top": -0.1}, {"score": "margin"}]
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises((BadInput, UnknownName), match=next(iter(wrong))):
        head(3, **wrong)


def test_stages_must_fit():
    made = head(2)
    x, grids = tokens(3)
    with pytest.raises(BadInput, match="reads 2 stages and got 3"):
        made(x, grids)
    with pytest.raises(BadInput, match="num_classes=0"):
        MultiScaleCues([4], 0)
