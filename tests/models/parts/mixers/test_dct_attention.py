"""DCT attention: exact at τ=1, its cost, and the best warm start below."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.fft import dct
from torch import Tensor

from vitkit.anatomy import check
from vitkit.compress.merge.tome import tome
from vitkit.errors import BadInput
from vitkit.models.dct import dct_matrix
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.dct_attention import (
    DCTAttention,
    energy_kept,
    kept_per_head,
    mixer_flops,
    report_energy,
    shrink_product,
)
from vitkit.models.parts.normalizers.sinkhorn import Sinkhorn
from vitkit.models.swap import swap
from vitkit.models.vit import ViT


def host(**options: object) -> ViT:
    torch.manual_seed(0)
    shape = {"img_size": (10, 14), "patch_size": 2, "in_chans": 1, "num_classes": 5, "embed_dim": 24, "depth": 2}
    model = ViT(**{**shape, "num_heads": 3, "mlp_ratio": 2.0, **options})
    for name, p in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def reference(part: DCTAttention, x: Tensor) -> Tensor:
    """The paper's form: scipy's DCT, one head at a time, output padded to C before a C×C projection."""
    width, kept, heads = part.dim, part.attn_dim, part.num_heads
    coefficients = torch.from_numpy(dct(x.detach().numpy(), norm="ortho", axis=-1))[..., :kept]
    q, k, v = (coefficients @ part.qkv.weight.T + part.qkv.bias).chunk(3, -1)
    out = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
        size = width / heads if part.score_scale == "full" else kept / heads
        out.append((a @ b.mT / size**0.5).softmax(-1) @ c)
    padded = torch.cat([*out, torch.zeros(*x.shape[:-1], width - kept, dtype=x.dtype)], -1)
    projection = torch.cat([part.proj.weight, torch.randn(width, width - kept, dtype=x.dtype)], 1)
    return padded @ projection.T + part.proj.bias


@pytest.mark.parametrize("scale", ["full", "head"])
@pytest.mark.parametrize("tau", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("fused", [True, False])
def test_matches_the_paper_s_form(scale: str, tau: float, fused: bool) -> None:
    torch.manual_seed(0)
    part = DCTAttention(24, 3, tau=tau, scale=scale).double()
    part.fused_attn = fused
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(part(x, TokenLayout(grid=(7, 1))), reference(part, x))


@pytest.mark.parametrize("scale", ["full", "head"])
def test_tau_one_reproduces_standard_attention(scale: str) -> None:
    model = host()
    images = torch.rand(3, 1, 10, 14)
    before = model(images)
    record = swap(model, "mixer", DCTAttention, tau=1.0, scale=scale)
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-5)
    check(model)
    record.undo()
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_host_weights_times_the_dct_reproduce_standard_attention() -> None:
    old = host().blocks[0].attn
    part = DCTAttention(24, 3, tau=1.0, scale="full")
    with torch.no_grad():
        part.qkv.weight.copy_(old.qkv.weight @ dct_matrix(24).T)
        part.qkv.bias.copy_(old.qkv.bias)
        part.proj.load_state_dict(old.proj.state_dict())
    x, layout = torch.randn(2, 9, 24), TokenLayout(grid=(3, 3))
    torch.testing.assert_close(part(x, layout), old(x, layout), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dim", "heads", "tau"), [(24, 3, 0.75), (24, 3, 0.5), (64, 4, 0.75), (64, 4, 1.0), (10, 2, 0.1)]
)
def test_number_of_parameters(dim: int, heads: int, tau: float) -> None:
    part = DCTAttention(dim, heads, tau)
    kept = heads * max(1, int(tau * dim / heads + 0.5))
    assert part.attn_dim == kept
    assert sum(p.numel() for p in part.parameters()) == 3 * kept**2 + 3 * kept + kept * dim + dim


def test_cost_of_the_projections() -> None:
    per_token = (mixer_flops(64, 4, 50, 0.75) - 2 * 50**2 * 48) / 50
    assert per_token == (2 * 0.75 + 3 * 0.75**2) * 64**2
    assert round(per_token / ((mixer_flops(64, 4, 50) - 2 * 50**2 * 64) / 50), 3) == 0.797


def test_halves_round_upwards() -> None:
    assert kept_per_head(10, 2, 0.5) == 3 and kept_per_head(14, 2, 0.5) == 4 and kept_per_head(8, 8, 0.1) == 1


def test_shrink_product_is_the_best_of_its_rank() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(3, 9, 6, dtype=torch.float64), torch.randn(3, 6, 8, dtype=torch.float64)
    a, b = shrink_product(left, right, 4)
    lost = torch.linalg.svdvals(left @ right)[:, 4:].square().sum(-1)
    torch.testing.assert_close((left @ right - a @ b).square().sum((-2, -1)), lost)
    torch.testing.assert_close(a.square().sum((-2, -1)), b.square().sum((-2, -1)))
    a, b = shrink_product(left[:, :3], right, 5)
    torch.testing.assert_close(a @ b, left[:, :3] @ right)


def products(qkv: torch.nn.Linear, proj: torch.nn.Linear, heads: int) -> tuple[Tensor, Tensor]:
    """Per head: what makes the scores, bias included, and what makes the output."""
    rows = torch.cat([qkv.weight, qkv.bias[:, None]], 1).double().unflatten(0, (3, heads, -1))
    return rows[0].mT @ rows[1], proj.weight.double().unflatten(1, (heads, -1)).transpose(0, 1) @ rows[2][..., :-1]


@pytest.mark.parametrize("scale", ["full", "head"])
def test_warm_start_keeps_each_head_s_products_as_well_as_its_rank_allows(scale: str) -> None:
    old = host().blocks[0].attn
    model = host()
    swap(model, "mixer", DCTAttention, where=0, tau=0.5, scale=scale)
    part = model.blocks[0].attn
    cut = torch.nn.Linear(12, 72)
    with torch.no_grad():
        cut.weight.copy_((old.qkv.weight.double() @ dct_matrix(24, torch.float64).T)[:, :12])
        cut.bias.copy_(old.qkv.bias)
    scores, values = products(cut, old.proj, 3)
    new_scores, new_values = products(part.qkv, part.proj, 3)
    # the old scores are divided by √8, the new ones by √4 and multiplied by q_factor
    new_scores = new_scores * part.q_factor * 2**0.5
    for want, got in ((scores, new_scores), (values, new_values)):
        lost = torch.linalg.svdvals(want)[:, 4:].square().sum(-1)
        torch.testing.assert_close((want - got).square().sum((-2, -1)), lost, rtol=1e-4, atol=1e-6)


def test_value_bias_moves_into_the_output_bias_exactly() -> None:
    model = host(embed_dim=12, num_heads=1)
    old = model.blocks[0].attn
    with torch.no_grad():
        old.qkv.weight[24:].zero_()  # nothing but the bias of v is left
    x, layout = torch.randn(2, 36, 12), TokenLayout(grid=(5, 7), prefix=(("class", 1),))
    want = old(x, layout)
    swap(model, "mixer", DCTAttention, where=0, tau=0.5)
    torch.testing.assert_close(model.blocks[0].attn(x, layout), want, rtol=0, atol=1e-5)


def test_energy_kept() -> None:
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    power = torch.from_numpy(dct(x.numpy(), norm="ortho")).square()
    torch.testing.assert_close(energy_kept(x, 4), power[..., :4].sum() / power.sum())
    assert energy_kept(x, 16) == pytest.approx(1.0)
    with pytest.raises(BadInput, match="num_kept=17"):
        energy_kept(x, 17)


def test_report_energy_leaves_the_model_as_found() -> None:
    model = host().train()
    before = copy.deepcopy(model.state_dict())
    shares = report_energy(model, torch.rand(4, 1, 10, 14), tau=0.5)
    assert list(shares) == ["blocks.0.attn", "blocks.1.attn"] and all(0 < s < 1 for s in shares.values())
    assert model.training and all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    swap(model, "mixer", DCTAttention)
    with pytest.raises(BadInput, match="before the swap"):
        report_energy(model, torch.rand(1, 1, 10, 14))


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_fold_gives_standard_attention_of_smaller_width(tau: float) -> None:
    model = host()
    swap(model, "mixer", DCTAttention, tau=tau, scale="head" if tau == 1.0 else "full")
    images = torch.rand(2, 1, 10, 14)
    before = model(images)
    for block in model.blocks:
        block.attn = block.attn.fold()
        assert not isinstance(block.attn, DCTAttention)
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-5)
    check(model)


def test_positions_normalizers_and_padding_work_on_it() -> None:
    model = host()
    swap(model, "normalizer", Sinkhorn, steps=5)
    images = torch.rand(2, 1, 10, 14)
    before = model(images)
    swap(model, "mixer", DCTAttention, tau=1.0)
    assert isinstance(model.blocks[0].attn.normalizer, Sinkhorn)
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-4)
    x, layout = model.embed(images)
    layout = layout.replace(valid=torch.rand(2, 35) > 0.4)
    assert model.readout(*model.run(x, layout)).isfinite().all()


def test_refuses_what_it_cannot_do() -> None:
    for options in ({"tau": 0.0}, {"tau": 1.5}, {"scale": "half"}):
        with pytest.raises(BadInput, match=next(iter(options))):
            DCTAttention(8, 2, **options)
    with pytest.raises(BadInput, match="does not divide"):
        DCTAttention(9, 2)
    model = host(qk_norm=True)
    with pytest.raises(BadInput, match="warm=False"):
        swap(model, "mixer", DCTAttention)
    swap(model, "mixer", DCTAttention, warm=False)
    assert model(torch.rand(1, 1, 10, 14)).shape == (1, 5)


def test_every_parameter_learns_and_it_compiles() -> None:
    model = host().train()
    swap(model, "mixer", DCTAttention, warm=False)
    images = torch.rand(4, 1, 10, 14)
    model(images).square().sum().backward()
    for name, p in model.blocks[0].attn.named_parameters():
        assert p.grad.isfinite().all()
        rows = p.grad.chunk(3)[::2] if name == "qkv.bias" else [p.grad]  # a key bias has no effect under softmax
        assert all((r != 0).any() for r in rows), name
    compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)
    assert model.bfloat16()(images.bfloat16()).isfinite().all()


def test_a_detour_through_half_precision_leaves_the_transform_exact() -> None:
    model = host()
    swap(model, "mixer", DCTAttention, tau=0.5)
    images, state = torch.rand(2, 1, 10, 14), copy.deepcopy(model.state_dict())
    before = model(images)
    model.bfloat16()
    assert model.blocks[0].attn.dct.value.dtype == torch.bfloat16
    model.float().load_state_dict(state)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_prefix_rows_are_ordinary_rows_and_merged_tokens_work() -> None:
    model = host(reg_tokens=4)
    swap(model, "mixer", DCTAttention, tau=0.5)
    merged, _ = tome(model, r=4)
    assert merged(torch.rand(2, 1, 10, 14)).isfinite().all()
