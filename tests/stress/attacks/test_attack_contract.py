"""What holds for every attack, whatever it does inside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vitkit.errors import BadInput
from vitkit.models.normalized import NormalizedModel
from vitkit.stress.attacks import carlini_wagner, deepfool, et_deepfool, fgsm, pgd

ATTACKS = {
    "fgsm": fgsm,
    "pgd-linf": lambda *a, **k: pgd(*a, steps=3, **k),
    "pgd-l2": lambda *a, **k: pgd(*a, steps=3, norm="l2", epsilon=0.5, step_size=0.2, restarts=2, **k),
    "pgd-stop": lambda *a, **k: pgd(*a, steps=3, early_stop=True, **k),
    "et-deepfool": lambda *a, **k: et_deepfool(*a, max_iter=4, **k),
    "deepfool": lambda *a, **k: deepfool(*a, max_iter=4, **k),
    "carlini-wagner": lambda *a, **k: carlini_wagner(*a, steps=6, search_steps=2, learning_rate=0.1, **k),
}
# without random draws, so that an image's result may not depend on its batch
DETERMINISTIC = {
    "fgsm": fgsm,
    "pgd": lambda *a, **k: pgd(*a, steps=5, random_start=False, early_stop=True, **k),
    "et-deepfool": lambda *a, **k: et_deepfool(*a, target=3, min_confidence=0.5, max_iter=8, **k),
    "et-runner-up": lambda *a, **k: et_deepfool(*a, target=3, reference="runner_up", max_iter=8, **k),
    "deepfool": lambda *a, **k: deepfool(*a, max_iter=8, **k),
}
every = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@every
def test_result_is_complete_and_success_is_what_the_model_says(attack, digits_cnn):
    model, x, y = digits_cnn
    result = attack(model, x, y)
    assert result.x_adv.shape == x.shape and not result.x_adv.requires_grad
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
    for value in (result.success, result.num_iter, result.queries, *result.log.values()):
        assert value.shape == (len(x),)
    assert result.success.dtype == torch.bool and result.success.any()
    with torch.no_grad():
        probs = model(result.x_adv).softmax(1)
    assert torch.equal(probs.argmax(1), result.log["predicted"])
    torch.testing.assert_close(probs.max(1).values, result.log["confidence"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        result.log["relative_change"], (result.x_adv - x).flatten(1).norm(dim=1) / x[0].numel() ** 0.5
    )
    assert (result.queries > result.num_iter).all()
    untouched = (result.x_adv == x).flatten(1).all(1)
    torch.testing.assert_close(result.log["ssim"][untouched], torch.ones(int(untouched.sum())))


@every
@pytest.mark.parametrize("train", [True, False])
def test_model_is_left_as_found(attack, digits_cnn, train):
    model, x, y = digits_cnn
    model = copy.deepcopy(model).train(train)
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    before = copy.deepcopy(model.state_dict())
    images = x[:6].clone()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    attack(model, images, y[:6])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, x[:6]) and images.grad is None
    assert all(m.training is train for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert all(p.grad is None for n, p in model.named_parameters() if n != "3.weight")
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every
def test_model_is_left_as_found_after_an_error(attack, digits_cnn):
    model, x, y = digits_cnn
    model = copy.deepcopy(model).train()
    calls = []

    class Breaks(nn.Module):
        def forward(self, logits):
            calls.append(1)
            if len(calls) > 1:
                raise KeyboardInterrupt
            return logits

    model.append(Breaks())
    with pytest.raises(KeyboardInterrupt):
        attack(model, x[:4], y[:4])
    assert model.training and all(p.requires_grad for p in model.parameters())


@every
def test_mode_does_not_matter(attack, digits_cnn):
    """Dropout and batch statistics are off inside, also for a model in training mode."""
    model, x, y = digits_cnn
    a = attack(copy.deepcopy(model).train(), x[:8], y[:8])
    b = attack(model, x[:8], y[:8])
    assert torch.equal(a.x_adv, b.x_adv)


@every
def test_same_seed_same_result(attack, digits_cnn):
    model, x, y = digits_cnn
    first, second = (attack(model, x[:8], y[:8], generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.x_adv, second.x_adv) and torch.equal(first.success, second.success)
    assert torch.equal(attack(model, x[:8], y[:8]).x_adv, attack(model, x[:8], y[:8]).x_adv)


@pytest.mark.parametrize("attack", DETERMINISTIC.values(), ids=DETERMINISTIC)
def test_an_image_does_not_depend_on_its_batch(attack, digits_cnn):
    model, x, y = copy.deepcopy(digits_cnn[0]).double(), digits_cnn[1][:12].double(), digits_cnn[2][:12]
    together = attack(model, x, y)
    assert len(together.num_iter.unique()) > 1 or attack is fgsm
    for i in range(len(x)):
        alone = attack(model, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(alone.x_adv[0], together.x_adv[i], rtol=1e-7, atol=1e-9)
        assert alone.success[0] == together.success[i] and alone.num_iter[0] == together.num_iter[i]


@every
def test_runs_on_a_vit_in_bfloat16_and_under_autocast(attack, untrained_vit):
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    result = attack(NormalizedModel(untrained_vit, [0.5], [0.25]).bfloat16(), x.bfloat16(), y)
    assert result.x_adv.dtype == torch.float32 and result.log["confidence"].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attack(NormalizedModel(untrained_vit, [0.5], [0.25]).train(), x, y)
    assert result.x_adv.isfinite().all() and result.x_adv.dtype == torch.float32


@every
def test_runs_under_no_grad_and_inference_mode(attack, untrained_vit):
    x, y = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    expected = attack(untrained_vit, x, y).x_adv
    with torch.no_grad():
        assert torch.equal(attack(untrained_vit, x, y).x_adv, expected)
    with torch.inference_mode():
        assert torch.equal(attack(untrained_vit, x.clone(), y).x_adv, expected)


@every
def test_labels_default_to_the_predictions(attack, digits_cnn):
    model, x, _ = digits_cnn
    predicted = model(x[:5]).argmax(1)
    assert torch.equal(attack(model, x[:5]).x_adv, attack(model, x[:5], predicted).x_adv)


@every
def test_bad_input_is_refused_with_advice(attack, digits_cnn):
    model, x, y = digits_cnn
    with pytest.raises(BadInput, match="NormalizedModel"):
        attack(model, x * 255, y)
    with pytest.raises(BadInput, match=r"\(B, C, H, W\)"):
        attack(model, x[0], y)
    with pytest.raises(BadInput, match="non-empty"):
        attack(model, x[:0], y[:0])
    with pytest.raises(BadInput, match="the model has 10"):
        attack(model, x, y + 10)
    with pytest.raises(BadInput, match="one for each of 48"):
        attack(model, x, y[:3])
    with pytest.raises(BadInput, match="class numbers"):
        attack(model, x, y.float())
    with pytest.raises(BadInput, match="logits"):
        attack(model[:6], x, y)

    class Poisoned(nn.Module):
        def forward(self, images):
            return model(images) * float("nan")

    with pytest.raises(BadInput, match="NaN or infinite logits for 48 of 48"):
        attack(Poisoned(), x, y)


def test_log_odds_points_as_cross_entropy_does_and_does_not_saturate():
    from vitkit.stress.attacks.victim import log_odds

    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    (a,) = torch.autograd.grad(-log_odds(z, y).sum(), z)
    (b,) = torch.autograd.grad(nn.functional.cross_entropy(z, y, reduction="sum"), z)
    torch.testing.assert_close(nn.functional.normalize(a), nn.functional.normalize(b))
    torch.testing.assert_close(torch.sigmoid(log_odds(z, y)), z.softmax(1).gather(1, y[:, None])[:, 0])
    sure = torch.tensor([[200.0, 0.0, -5.0]], requires_grad=True)
    (g,) = torch.autograd.grad(-log_odds(sure, torch.tensor([0])).sum(), sure)
    assert g[0, 0] == -1 and abs(g[0, 1:].sum() - 1) < 1e-6


def test_similarity_works_on_small_images():
    from vitkit.stress.attacks.result import similarity

    for side in (3, 5, 8, 11, 32):
        x = torch.rand(2, 1, side, side)
        torch.testing.assert_close(similarity(x, x), torch.ones(2))
        assert (similarity(1 - x, x) < 0.9).all()
    assert similarity(torch.rand(2, 1, 2, 2), torch.rand(2, 1, 2, 2)).isnan().all()


def _foreign(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A tiny network of timm that is no plain ViT, in training mode, and images for it."""
    from timm.models.convnext import ConvNeXt
    from timm.models.resnet import BasicBlock, ResNet
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    if name == "swin":
        net: nn.Module = SwinTransformer(
            img_size=16, patch_size=2, window_size=4, in_chans=2, num_classes=4, embed_dim=8, depths=(1, 1),
            num_heads=(2, 2),
        )  # fmt: skip
    elif name == "convnext":
        net = ConvNeXt(in_chans=2, num_classes=4, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), patch_size=2)
    else:
        net = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=4, in_chans=2, channels=(8, 8, 8, 8))
    nn.init.normal_(net.get_classifier().weight)
    side = 16 if name == "swin" else 32
    return NormalizedModel(net, [0.5] * 2, [0.25] * 2), torch.rand(3, 2, side, side)


@every
@pytest.mark.parametrize("name", ["swin", "convnext", "resnet"])
def test_networks_that_are_no_vit_are_attacked_and_left_as_found(attack, name):
    model, x = _foreign(name)
    before = copy.deepcopy(model.state_dict())
    result = attack(model, x, torch.tensor([0, 1, 2]))
    assert result.x_adv.isfinite().all() and result.x_adv.shape == x.shape
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model.eval()(result.x_adv).argmax(1), result.log["predicted"])
