"""SparseAttnNet: what its logits depend on, how the scorer learns, how k changes the computation."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

import vitkit
from vitkit.compress.cost import count_flops
from vitkit.errors import BadInput
from vitkit.models.pixel_selection import Selection, distillation
from vitkit.models.vit import collect_aux
from vitkit.tasks import Classify
from vitkit.testing import check_backbone
from vitkit.train import Supervised, TrainSettings, fit


def femto(**options):
    torch.manual_seed(0)
    options = {"img_size": 12, "in_chans": 2, "num_classes": 5, **options}
    return timm.create_model("sparse_attn_net_femto", **options).eval()


def pictures(n=3, side=12, chans=2):
    return torch.randn(n, chans, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "chans", "size"), [("femto", 1, 28), ("femto", 5, 8), ("tiny", 3, 16)])
def test_timms_contract(name, chans, size):
    report = check_backbone(f"sparse_attn_net_{name}", image_size=size, in_chans=chans, img_size=size)
    assert "reset_classifier" in report.passed


def test_unselected_pixels_have_no_say_for_a_fixed_choice_and_gates():
    net, images = femto(), pictures()
    chosen = net.select(images)
    plain = net.classify(images, chosen)
    assert torch.allclose(plain, net(images), atol=1e-6)
    other = torch.where(chosen.to_map().unsqueeze(1), images, 7 * torch.randn_like(images))
    assert torch.equal(net.classify(other, chosen), plain)
    # the scorer sees them, so the choice itself may change
    assert not torch.allclose(net(other), plain, atol=1e-4)


def test_a_selected_pixel_has():
    net, images = femto(), pictures(1)
    chosen = net.select(images)
    row, col = divmod(int(chosen.pixels[0, 4]), 12)
    other = images.clone()
    other[0, :, row, col] += 1
    assert not torch.allclose(net.classify(other, chosen), net.classify(images, chosen), atol=1e-4)


def test_the_order_of_the_selected_pixels_does_not_matter():
    net, images = femto(depth=2), pictures()
    chosen = net.select(images)
    order = torch.randperm(chosen.pixels.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = Selection(chosen.pixels[:, order], chosen.scores[:, order], chosen.size)
    assert torch.allclose(net.classify(images, shuffled), net.classify(images, chosen), atol=1e-5)


def test_the_auxiliary_loss_is_the_divergence_from_the_last_layers_class_attention():
    net, images = femto(depth=2, explore=0.0).train(), pictures()
    with collect_aux(net) as aux:
        net(images)
    # the same with explicit weights
    state = net.begin(images)
    state = net.stages[0](state)
    block = net.stages[1]
    q, k, _ = block.attn.heads(block.norm1(state.x))
    weights = ((q @ k.transpose(-2, -1)) / 4).softmax(-1).mean(1)[:, 0, 1:]
    expected = 0.5 * distillation(weights / weights.sum(1, keepdim=True), state.chosen.scores)
    assert list(aux) == [("sparse-attn-net", 1)]
    assert float(aux["sparse-attn-net", 1].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_auxiliary_loss_teaches_only_the_scorer():
    net = femto().train()
    with collect_aux(net) as aux:
        net(pictures())
    sum(aux.values()).backward()
    taught = {name.split(".")[1] for name, p in net.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert taught == {"scorer"}
    for silent in (femto(distill=0.0).train(), femto()):
        with collect_aux(silent) as aux:
            silent(pictures())
        assert not aux


def test_the_gates_carry_a_gradient_to_the_scorer():
    net = femto(distill=0.0).train()
    net.head.weight.data.normal_()
    net(pictures()).square().sum().backward()
    assert all(bool(p.grad.any()) for p in net.selector.scorer.parameters())


def test_the_scorer_learns_from_distillation_where_attention_looks():
    """A teacher that attends to bright pixels: the scorer, which starts blind, ends up ranking bright pixels first."""
    net = femto(in_chans=1, share=0.5).train()
    images = (pictures(64, chans=1) > 0.8).float() + 0.1 * pictures(64, chans=1)
    optimizer = torch.optim.Adam(net.selector.scorer.parameters(), lr=2e-2)

    def teach(chosen):
        values = images.flatten(2)[:, 0].gather(1, chosen.pixels)
        return distillation((3 * values).exp(), chosen.scores)

    before = float(teach(net.select(images)))
    for _ in range(60):
        optimizer.zero_grad()
        teach(net.select(images)).backward()
        optimizer.step()
    net.eval()
    chosen = net.select(images)
    assert float(teach(chosen)) < 0.3 * before
    bright = images[:, 0] > 0.6
    found = (chosen.to_map() & bright).sum() / bright.sum()
    assert float(found) > 0.95


def test_k_changes_the_computation():
    net, images = femto(img_size=24), pictures(2, 24)
    most = count_flops(net, images)
    assert net.forward_features(images).shape == (2, 1 + round(0.3 * 576), 64)
    net.budget.set(50)
    few = count_flops(net, images)
    assert net.forward_features(images).shape == (2, 51, 64)
    # what does not depend on k: the scorer and the head
    scorer = 2 * 2 * 576 * (9 * 2 * 8 + 9 * 8 * 16 + 16)
    fixed = scorer + 2 * 2 * 64 * 5
    assert fixed < few < fixed + (most - fixed) * 51 / 173
    assert net(pictures(2, 36)).shape == (2, 5)
    assert net.select(pictures(1, 36)).pixels.shape == (1, round(50 * 36**2 / 24**2))


def test_evaluation_is_deterministic_and_training_explores():
    net, images = femto(), pictures()
    assert torch.equal(net.select(images).pixels, net.select(images).pixels)
    net.train()
    torch.manual_seed(0)
    first, second = net.select(images).pixels, net.select(images).pixels
    assert first.shape == second.shape and not torch.equal(first, second)
    scores = net.selector.scorer(images).flatten(1)
    best = scores.argsort(dim=1, descending=True, stable=True)[:, : round(0.9 * first.shape[1])]
    assert all(set(b.tolist()) <= set(f.tolist()) for b, f in zip(best, first))


def test_maps_and_features():
    net, images = femto(depth=2), pictures()
    features, maps = net.forward_intermediates(images, norm=True)
    chosen = net.select(images).to_map()
    assert [tuple(m.shape) for m in maps] == [(3, 64, 12, 12)] * 2 and features.shape[1] == 1 + int(chosen[0].sum())
    assert torch.equal(maps[1].abs().sum(1) > 0, chosen)
    assert torch.allclose(maps[1].flatten(2)[0][:, chosen[0].flatten()].T, features[0, 1:], atol=1e-6)
    wide = timm.create_model("sparse_attn_net_femto", features_only=True)
    assert [tuple(m.shape) for m in wide(torch.randn(1, 3, 32, 32))] == [(1, 64, 32, 32)]


def test_trained_by_the_loop_k_follows_the_loss_and_is_saved(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(32, 1, 8, 8)
    labels = (images.mean((1, 2, 3)) > 0.5).long()
    batches = [{"images": images[i : i + 8], "labels": labels[i : i + 8]} for i in range(0, 32, 8)]

    def run(out, **options):
        torch.manual_seed(0)
        net = vitkit.build("sparse_attn_net_femto", img_size=8, in_chans=1, num_classes=2, tolerance=0.0, every=1)
        settings = TrainSettings(epochs=8, lr=3e-3, precision="fp32", **options)
        history = fit(Supervised(net, Classify(("a", "b"))), batches, settings=settings, out_dir=out)
        return net, [row["loss"] for row in history.rows]

    net, losses = run(tmp_path)
    # the same rule by hand, on the losses the loop reports
    twin = femto(img_size=8, tolerance=0.0, every=1)
    for epoch in range(8):
        twin.budget.on_epoch(epoch, 8, losses[epoch - 1] if epoch else None)
    assert net.budget.count == twin.budget.count != round(0.3 * 64)
    fresh = femto(img_size=8, in_chans=1, num_classes=2)
    fresh.load_state_dict(net.state_dict())
    assert fresh.budget.count == net.budget.count
    averaged, _ = run(None, ema_decay=0.5)
    assert averaged.budget.count == net.budget.count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_formats_learn(dtype):
    net = femto().to(dtype).train()
    with collect_aux(net) as aux:
        loss = F.cross_entropy(net(pictures().to(dtype)).float(), torch.arange(3))
    (loss + sum(aux.values())).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters())


def test_it_compiles_without_graph_breaks():
    torch._dynamo.reset()
    assert torch._dynamo.explain(femto())(pictures()).graph_break_count == 0


def test_checkpointing_keeps_the_gradients():
    grads = []
    for flag in (False, True):
        net = femto(explore=0.0).train()
        net.set_grad_checkpointing(flag)
        with collect_aux(net) as aux:
            loss = net(pictures()).square().sum()
        (loss + sum(aux.values())).backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


def test_what_is_refused():
    with pytest.raises(BadInput, match="between 0 and 1"):
        femto(share=0.6)
    with pytest.raises(BadInput, match="num_heads=3 must divide embed_dim=64"):
        femto(num_heads=3)
    with pytest.raises(BadInput, match=r"\(B, 2, H, W\)"):
        femto()(pictures(chans=3))
