from __future__ import annotations

import copy

import pytest
import timm
import torch

import vitkit
from vitkit.anatomy import Trace
from vitkit.errors import BadInput, UnknownName
from vitkit.models.backbones.edit_host import EDIT
from vitkit.models.diagnostics.attention_sink import attention_sink
from vitkit.models.layout import LogitEdit
from vitkit.models.normalized import NormalizedModel
from vitkit.models.swap import swap
from vitkit.models.vit import Attention
from vitkit.testing.checks import check_backbone
from vitkit.testing.worlds import tiny_vit


def plain(seed=0, **options):
    shape = {"img_size": (12, 20), "in_chans": 3, "num_classes": 5, "embed_dim": 16, "depth": 3, "num_heads": 2}
    model = tiny_vit(seed=seed, **(shape | options))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        # norms, biases, tokens and the head must differ from their trivial start
        if parameter.ndim < 2 or "token" in name or "head" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    return model.eval()


def images(n=3, seed=1):
    return torch.rand(n, 3, 12, 20, generator=torch.Generator().manual_seed(seed))


def without_class_keys(vit, x):
    """Logits of a host in which nobody may attend to the class token, and the class token to patches alone."""

    def forbid(logits, layout):
        out = logits.clone()
        out[..., 0] = -torch.inf
        out[..., 0, : layout.num_prefix] = -torch.inf
        return out

    tokens, layout = vit.embed(x)
    tokens, layout = vit.run(tokens, layout.replace(edits=(LogitEdit("no class keys", "set", forbid),)))
    return vit.readout(tokens, layout)


HOSTS = [
    {},
    {"init_values": 0.5},
    {"no_embed_class": True},
    {"reg_tokens": 3},
    {"reg_tokens": 3, "no_embed_class": True},
    {"qk_norm": True, "pre_norm": True},
    {"qkv_bias": False, "pos_embed": "none"},
    {"fc_norm": True},
]


@pytest.mark.parametrize("options", HOSTS)
@torch.no_grad()
def test_shared_and_aligned_to_inputs_is_the_masked_host(options):
    vit = plain(**options)
    expected = without_class_keys(vit, images())
    assert float((expected - vit(images())).abs().max()) > 1e-3
    edit = EDIT.from_vit(vit, share="all", align="pre")
    torch.testing.assert_close(edit(images()), expected, atol=1e-5, rtol=1e-5)
    # copies of the weights compute the same as the weights
    for share in ("none", "attn"):
        copied = EDIT.from_vit(vit, share=share, align="pre")
        torch.testing.assert_close(copied(images()), expected, atol=1e-5, rtol=1e-5)
    post = EDIT.from_vit(vit, share="all", align="post")
    assert float((post(images()) - expected).abs().max()) > 1e-3


def test_conversion_leaves_the_vit_alone_and_shares_nothing():
    vit = plain(reg_tokens=2)
    before, keys = vit(images()).detach(), list(vit.state_dict())
    edit = EDIT.from_vit(NormalizedModel(vit, [0.5] * 3, [0.2] * 3))
    assert list(vit.state_dict()) == keys
    ours = {p.data_ptr() for p in edit.parameters()}
    assert not ours & {p.data_ptr() for p in vit.parameters()}
    with torch.no_grad():
        for p in edit.parameters():
            p.zero_()
    assert torch.equal(vit(images()), before)
    assert edit.num_prefix_tokens == 2 and edit.cls_token is None
    assert edit.pos_embed.shape == (1, 15, 16)


def test_timm_weights_are_taken():
    torch.manual_seed(0)
    vit = timm.create_model("deit3_small_patch16_224", img_size=32, num_classes=5, depth=2, embed_dim=48, num_heads=3)
    edit = EDIT.from_vit(vit.eval())
    assert torch.equal(edit.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)
    assert torch.equal(edit.read_out.state, vit.cls_token)
    # DeiT III gives the class token no position
    assert vit.no_embed_class


@torch.no_grad()
@pytest.mark.parametrize("share", ["none", "attn", "all"])
def test_the_state_never_reaches_the_encoder(share):
    edit = EDIT.from_vit(plain(), share=share)
    outputs = []
    for _ in range(2):
        with Trace(edit, ["embed", "blocks.*.resid_post", "logits"]) as trace:
            edit(images())
        outputs.append(trace)
        edit.read_out.state.add_(torch.randn_like(edit.read_out.state))
    for site in outputs[0].sites:
        assert torch.equal(outputs[0][site], outputs[1][site]) == (site != "logits")
    assert all(row.class_mass == 0 for row in attention_sink(edit, images()))


@torch.no_grad()
def test_call_points_of_shared_blocks_show_the_encoder():
    edit = EDIT.from_vit(plain(), share="all")
    with Trace(edit, ["blocks.*.mlp.hidden", "blocks.*.attn.weights", "final_norm", "logits"]) as trace:
        logits = edit(images())
    assert trace["blocks.2.mlp.hidden"].shape[1] == 15
    assert trace["blocks.2.attn.weights"].shape[-1] == 15
    assert torch.equal(trace["logits"], logits)


@pytest.mark.parametrize("align", ["post", "pre"])
def test_gradient_reaches_early_patches_directly(align):
    edit = EDIT.from_vit(plain(), share="none", align=align)
    x, layout = edit.embed(images())
    states = []
    edit.run(x, layout, states)
    assert len(states) == 4
    leaves = [(tokens.detach().requires_grad_(), there) for tokens, there in states]
    edit.readout(*leaves[-1], leaves).sum().backward()
    read = leaves[:-1] if align == "pre" else leaves[1:]
    assert all(bool(tokens.grad.any()) for tokens, _ in read)


def test_sharing_decides_the_parameters():
    count = {
        share: sum(p.numel() for p in timm.create_model("edit_femto", num_classes=3, share=share).parameters())
        for share in ("none", "attn", "all")
    }
    dim, hidden = 64, 128
    mlp_part = 2 * dim + dim * hidden + hidden + hidden * dim + dim
    attn_part = 2 * dim + 4 * dim * dim + 4 * dim
    assert count["attn"] - count["all"] == 4 * mlp_part
    assert count["none"] - count["attn"] == 4 * attn_part


@pytest.mark.parametrize("options", [{}, {"share": "attn", "align": "pre"}, {"share": "all", "init_values": 0.1}])
def test_every_parameter_learns(options):
    torch.manual_seed(0)
    model = timm.create_model("edit_femto", img_size=16, patch_size=4, num_classes=3, **options)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    model(torch.rand(4, 3, 16, 16)).square().sum().backward()
    dead = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # nothing reads the output of the last block under "pre"
    unread = {n for n in dead if n.startswith(("blocks.3.mlp", "blocks.3.norm2"))}
    assert dead == (unread if options.get("align") == "pre" else set())


@pytest.mark.parametrize(
    ("name", "millions"), [("edit_femto", None), ("edit_tiny", 10.98), ("edit_small", 43.2), ("edit_base", 171.4)]
)
def test_registered_sizes(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert type(model) is EDIT
    if millions is not None:
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


def test_timm_contract():
    report = check_backbone("edit_femto", image_size=28, in_chans=1, img_size=28)
    assert "features then head" in report.passed
    model = timm.create_model("edit_femto", img_size=8, in_chans=1, features_only=True, out_indices=(1, 3))
    assert [tuple(m.shape) for m in model(torch.zeros(2, 1, 8, 8))] == [(2, 64, 4, 4)] * 2
    assert isinstance(vitkit.build("edit_femto", img_size=8, mixer="dct-attention"), EDIT)
    model = timm.create_model("edit_femto", img_size=32, dynamic_img_size=True, num_classes=0)
    assert model(torch.zeros(2, 3, 40, 32)).shape == (2, 64)
    assert "read_out.state" in model.no_weight_decay()


def test_stochastic_depth_reaches_the_decoder():
    model = timm.create_model("edit_femto", drop_path_rate=0.3)
    assert [getattr(layer.drop_path1, "drop_prob", 0.0) for layer in model.read_out.layers] == pytest.approx(
        [0.0, 0.1, 0.2, 0.3]
    )


@torch.no_grad()
def test_shared_projection_that_cannot_be_cut():
    class Wrapped(torch.nn.Linear):
        pass

    edit = EDIT.from_vit(plain(qk_norm=True)).eval()
    expected = edit(images())
    for block in edit.blocks:
        linear = block.attn.qkv
        wrapped = Wrapped(linear.in_features, linear.out_features)
        wrapped.load_state_dict(linear.state_dict())
        block.attn.qkv = wrapped
    torch.testing.assert_close(edit(images()), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_and_copies():
    edit = EDIT.from_vit(plain(), share="all")
    assert torch.equal(copy.deepcopy(edit)(images()), edit(images()))
    low = edit.to(torch.bfloat16)(images().to(torch.bfloat16))
    assert low.dtype == torch.bfloat16 and bool(torch.isfinite(low).all())


@pytest.mark.parametrize("share", ["none", "all"])
def test_compiles_without_graph_breaks(share):
    torch._dynamo.reset()
    assert torch._dynamo.explain(EDIT.from_vit(plain(depth=1), share=share))(images()).graph_break_count == 0


def test_models_that_cannot_be_converted_are_refused():
    with pytest.raises(BadInput, match="global_pool"):
        EDIT.from_vit(plain(global_pool="avg"))
    with pytest.raises(BadInput, match="distillation"):
        EDIT.from_vit(timm.create_model("deit_tiny_distilled_patch16_224", depth=1, img_size=32))
    with pytest.raises(BadInput, match="not EDIT"):
        EDIT.from_vit(EDIT.from_vit(plain()))
    with pytest.raises(UnknownName, match="share"):
        EDIT.from_vit(plain(), share="some")
    vit = plain()
    swap(vit, "normalizer", "sinkhorn", where=1)
    with pytest.raises(BadInput, match=r"blocks\.1"):
        EDIT.from_vit(vit)
    with pytest.raises(BadInput, match="class_token"):
        timm.create_model("edit_femto", class_token=True)


def test_parts_that_a_shared_decoder_cannot_follow_are_refused():
    edit = EDIT.from_vit(plain(), share="all")
    record = swap(edit, "normalizer", "sinkhorn")
    with pytest.raises(BadInput, match="normaliser"):
        edit(images())
    record.undo()
    assert type(edit.blocks[0].attn) is Attention
    edit = EDIT.from_vit(plain(), share="none")
    swap(edit, "normalizer", "sinkhorn")
    assert edit(images()).shape == (3, 5)
    with pytest.raises(BadInput, match="every block"):
        edit.readout(*edit.run(*edit.embed(images())))
