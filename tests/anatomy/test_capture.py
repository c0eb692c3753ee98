from __future__ import annotations

import pytest
import timm
import torch

from vitkit.anatomy import (
    Intervene,
    Trace,
    check,
    decompose_residual,
    expand,
    host,
    linear_groups,
    linear_inputs,
    roles,
    scale,
    site_names,
    uniform_attention,
    untouched,
    zero,
)
from vitkit.errors import UnknownName
from vitkit.models.build import build
from vitkit.models.normalized import NormalizedModel

IMAGES = torch.rand(3, 1, 20, 28, generator=torch.Generator().manual_seed(5))


def model(**options):
    torch.manual_seed(2)
    defaults = {"img_size": (20, 28), "patch_size": 4, "in_chans": 1, "num_classes": 4, "depth": 3}
    net = build("vit_femto", **{**defaults, **options})
    for p in net.parameters():  # a freshly initialised head is zero-like; make every path matter
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.15)
    return net.eval()


def snapshot(net):
    return {
        "mode": [m.training for m in net.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()],
        "grads": [p.grad is None for p in net.parameters()],
        "requires": [p.requires_grad for p in net.parameters()],
        "taps": net.taps,
        "fused": [b.attn.fused_attn for b in net.blocks],
        "rng": torch.get_rng_state().tolist(),
    }


def test_every_site_is_seen_with_its_shape():
    net = model(reg_tokens=2)
    with Trace(net, "*") as trace:
        logits = net(IMAGES)
    n, d, h = 38, 64, 4
    shapes = {
        "embed": (3, n, d),
        "blocks.1.resid_pre": (3, n, d),
        "blocks.1.attn.q": (3, h, n, 16),
        "blocks.1.attn.logits": (3, h, n, n),
        "blocks.1.attn.weights": (3, h, n, n),
        "blocks.1.attn.z": (3, n, h, 16),
        "blocks.1.attn.out": (3, n, d),
        "blocks.1.resid_mid": (3, n, d),
        "blocks.1.mlp.hidden": (3, n, 128),
        "blocks.1.mlp.out": (3, n, d),
        "blocks.1.resid_post": (3, n, d),
        "final_norm": (3, n, d),
        "logits": (3, 4),
    }
    assert {name: tuple(trace[name].shape) for name in shapes} == shapes
    assert sorted(trace.sites) == sorted(site_names(net))
    torch.testing.assert_close(trace["blocks.0.attn.weights"].sum(-1), torch.ones(3, h, n))
    torch.testing.assert_close(trace["logits"], logits)


def test_looking_changes_nothing_and_leaves_no_trace():
    net = model()
    net.train()
    before, plain = snapshot(net), net(IMAGES)
    with Trace(net, "blocks.*.attn.weights", grad=True):
        seen = net(IMAGES)
    torch.testing.assert_close(seen, plain, atol=1e-4, rtol=1e-4)
    assert snapshot(net) == before
    with pytest.raises(RuntimeError, match="on purpose"), Intervene(net, {"embed": zero()}):
        raise RuntimeError("on purpose")
    assert snapshot(net) == before


def test_gradients_of_weights_match_finite_differences():
    net = model().double()
    x = IMAGES[:1].double()
    with Trace(net, "blocks.1.attn.weights", grad=True) as trace:
        net(x)[0, 2].backward()
    grad = trace.grad("blocks.1.attn.weights")
    index, step = (0, 1, 0, 5), 1e-6

    def shifted(sign):
        def edit(value, ctx):
            out = value.clone()
            out[index] += sign * step
            return out

        with torch.no_grad(), Intervene(net, {"blocks.1.attn.weights": edit}):
            return net(x)[0, 2]

    numeric = (shifted(1) - shifted(-1)) / (2 * step)
    torch.testing.assert_close(grad[index], numeric, atol=1e-7, rtol=1e-5)


def test_gradients_without_any_trainable_parameter():
    net = model()
    with untouched(net), Trace(net, "blocks.*.attn.weights", grad=True) as trace:
        net(IMAGES).sum().backward()
    assert all(trace.grad(f"blocks.{i}.attn.weights").abs().sum() > 0 for i in range(3))
    assert all(p.grad is None for p in net.parameters())


def test_interventions():
    net = model()
    with (
        Intervene(net, {"blocks.0.attn.z": zero((slice(None), slice(None), 1))}),
        Trace(net, "blocks.0.attn.z") as trace,
    ):
        net(IMAGES)
    assert trace["blocks.0.attn.z"][:, :, 1].abs().max() == 0
    assert trace["blocks.0.attn.z"][:, :, 0].abs().max() > 0
    plain = _plain(net)
    with Intervene(net, {"logits": scale(factor=2.0)}), Intervene(net, {"logits": lambda v, ctx: v + 1}):
        torch.testing.assert_close(net(IMAGES), 2 * plain + 1)
    with (
        Intervene(net, {"blocks.*.attn.weights": uniform_attention([0])}),
        Trace(net, "blocks.2.attn.weights") as trace,
    ):
        net(IMAGES)
    torch.testing.assert_close(trace["blocks.2.attn.weights"][:, 0], torch.full((3, 36, 36), 1 / 36))


def _plain(net):
    with torch.no_grad():
        return net(IMAGES)


def test_errors_name_the_site():
    net = model()
    with pytest.raises(UnknownName, match="resid_post"):
        Trace(net, "blocks.0.resid_pots")
    with pytest.raises(LookupError, match="Nothing was captured"), Trace(net, "blocks.0.mlp.hidden"):
        pass
    with pytest.raises(TypeError, match="ResNet"):
        host(timm.create_model("resnet10t"))


def test_foreign_models_are_traced_by_module_path():
    net = timm.create_model("resnet10t", num_classes=3).eval()
    with Trace(net, "layer4", grad=True) as trace:
        net(torch.randn(2, 3, 64, 64))[:, 0].sum().backward()
    assert trace["layer4"].shape == (2, 512, 2, 2)
    assert trace.grad("layer4").abs().sum() > 0
    assert not net.layer4._forward_hooks


@pytest.mark.parametrize(
    "options", [{}, {"init_values": 0.1}, {"class_token": False, "global_pool": "avg", "reg_tokens": 3}]
)
def test_residual_stream_is_the_sum_of_its_writers(options):
    net = NormalizedModel(model(**options), [0.4], [0.2])
    parts = decompose_residual(net, IMAGES)
    assert parts.units.shape[2] == 1 + 3 * 4 + 3 == len(parts.names)
    torch.testing.assert_close(parts.units.sum(2), parts.stream, atol=1e-4, rtol=1e-4)
    norm = torch.nn.LayerNorm(64)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    torch.testing.assert_close(parts.through_final_norm(norm).sum(2), norm(parts.stream), atol=1e-4, rtol=1e-4)


def test_untouched_restores_everything_after_an_exception():
    net = model().train()
    net.blocks[0].mlp.fc1.weight.requires_grad_(False)
    net.norm.weight.grad = torch.ones_like(net.norm.weight)
    before = snapshot(net)
    with pytest.raises(ZeroDivisionError), untouched(net):
        assert not net.training
        net.blocks[0].register_forward_hook(lambda *_: None)
        net.blocks[1].attn.fused_attn = False
        torch.rand(5)
        raise ZeroDivisionError
    assert snapshot(net) == before


def test_untouched_restores_running_statistics_and_notices_changed_weights():
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    mean = net[0].running_mean.clone()
    with untouched(net):
        net[0].train()
        net(torch.randn(8, 3))
    assert torch.equal(net[0].running_mean, mean)
    with pytest.raises(RuntimeError, match="1.weight"), untouched(net), torch.no_grad():
        net[1].weight.add_(1)


def test_roles_and_groups():
    net = model()
    table = roles(net)
    assert table["patch_embed.proj"] == "patch_embed"
    assert table["blocks.2.mlp.fc2"] == "fc2"
    assert linear_groups(net.blocks[0]) == [["attn.qkv"], ["attn.proj"], ["mlp.fc1"], ["mlp.fc2"]]
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))
    assert {"qkv", "proj", "fc1", "fc2", "patch_embed"} <= set(roles(swin).values())


def test_linear_inputs_sees_what_the_layer_sees():
    net = model()
    seen = {}
    with linear_inputs(net, ["blocks.1.mlp.fc2"], seen.__setitem__), Trace(net, "blocks.1.mlp.hidden") as trace:
        net(IMAGES)
    torch.testing.assert_close(seen["blocks.1.mlp.fc2"], trace["blocks.1.mlp.hidden"])
    assert not net.blocks[1].mlp.fc2._forward_pre_hooks


def test_check_notices_what_pruning_libraries_break():
    net = model()
    check(net)
    net.blocks[1].attn.scale = 1.0
    net.blocks[2].attn.num_heads = 3
    with pytest.raises(ValueError, match=r"blocks\.2\.attn\.qkv.*") as error:
        check(net)
    assert "blocks.1.attn.scale" in str(error.value)


def test_expand_covers_every_copy_once():
    x = torch.arange(3.0).view(3, 1)
    pieces = [(chunk.flatten().tolist(), rows) for chunk, rows in expand(x, 4, chunk=5)]
    assert [v for values, _ in pieces for v in values] == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    assert [rows.stop for _, rows in pieces] == [5, 10, 12]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_works_under_no_grad_and_in_half_precision(dtype):
    net = model().to(dtype)
    with torch.no_grad(), Trace(net, ["blocks.*.attn.weights"]) as trace:
        net(IMAGES.to(dtype))
    assert trace["blocks.2.attn.weights"].dtype == dtype


def test_an_edit_that_nothing_met_is_an_error():
    net = model()
    with (
        pytest.raises(LookupError, match=r"Nothing was changed at \['blocks.0.mlp.hidden'"),
        Intervene(net, {"blocks.0.mlp.hidden": zero()}),
    ):
        pass
    net.blocks[1].attn = torch.nn.Identity()  # a mixer without attention weights
    with (
        pytest.raises(LookupError, match=r"blocks\.1\.attn\.weights"),
        Intervene(net, {"blocks.*.attn.weights": uniform_attention()}),
    ):
        net(IMAGES)
    assert net.taps == ()
    again = Intervene(model(), {"logits": zero()})
    for _ in range(2):
        with pytest.raises(LookupError), again:
            pass


def test_uniform_attention_gives_padding_nothing():
    class Pad(torch.nn.Module):
        def forward(self, x, keys, layout):
            valid = torch.ones(len(x), 35, dtype=torch.bool)
            valid[0, 20:] = False
            return x, layout.replace(valid=valid)

    net = model()
    net.blocks[0].reduce = Pad()
    with (
        Intervene(net, {"blocks.1.attn.weights": uniform_attention(h for h in (0, 2))}),
        Trace(net, "blocks.1.attn.weights") as trace,
    ):
        net(IMAGES)
        net(IMAGES)  # the heads may come from an iterator, and every forward uses them
    weights = trace["blocks.1.attn.weights"]
    torch.testing.assert_close(weights[0, 0, :, :21], torch.full((36, 21), 1 / 21))
    assert not weights[0, :, :, 21:].any()
    torch.testing.assert_close(weights[1:, 2], torch.full((2, 36, 36), 1 / 36))
    assert not torch.allclose(weights[0, 1, :, :21], torch.full((36, 21), 1 / 21))


def test_modules_that_give_tuples_are_traced_as_they_are():
    net = torch.nn.GRU(3, 4, batch_first=True)
    wrapped = torch.nn.ModuleDict({"rnn": net})
    for grad in (False, True):
        with Trace(wrapped, "rnn", grad=grad) as trace:
            out = net(torch.randn(2, 5, 3))
        assert trace["rnn"] is out


def test_a_stream_that_is_not_the_sum_of_its_parts_is_refused():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = model()
    assert decompose_residual(net, IMAGES).stream.shape == (3, 36, 64)
    old = net.blocks[1].attn.proj
    net.blocks[1].attn.proj = Doubled(64, 64)
    net.blocks[1].attn.proj.load_state_dict(old.state_dict())
    with pytest.raises(ValueError, match="The parts miss the residual stream"):
        decompose_residual(net, IMAGES)


def test_half_precision_streams_are_decomposed_too():
    parts = decompose_residual(model().bfloat16(), IMAGES.bfloat16())
    assert (parts.units.float().sum(2) - parts.stream.float()).abs().max() < 0.1 * parts.stream.abs().max()


def test_untouched_puts_back_buffers_that_were_replaced():
    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + 1
            return x

    net = Counts()
    before = net.seen
    with untouched(net):
        net(torch.ones(1))
        assert net.seen == 1
    assert net.seen is before and before == 0
