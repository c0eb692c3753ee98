from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from vitkit.errors import BadInput, UnknownName
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.readouts.edit import EDITDecoder
from vitkit.models.swap import swap
from vitkit.testing.checks import PLACES, check_part
from vitkit.testing.worlds import tiny_vit


def states_of(depth=3, batch=2, num=12, dim=8, prefix=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = num + sum(n for _, n in prefix)
    layout = TokenLayout(grid=(3, 4), prefix=prefix)
    return [(torch.randn(batch, count, dim, generator=generator), layout) for _ in range(depth)], layout


def decoder(depth=3, dim=8, heads=2, classes=5, **options):
    torch.manual_seed(1)
    made = EDITDecoder(dim, depth, heads, classes, 2.0, **options).eval()
    torch.nn.init.normal_(made.state)
    return made


def slow_decode(made, patches, keep=None):
    """The recursion, one image, layer and head at a time."""
    out = []
    for image in range(len(patches[0])):
        c = made.state[0, 0]
        for layer, x in zip(made.layers, patches):
            tokens = layer.norm1(x[image] if keep is None else x[image][keep[image]])
            attn, heads = layer.attn, layer.attn.num_heads
            q, kv = attn.q(layer.norm1(c)), attn.kv(tokens)
            d = len(c) // heads
            k, v = kv[:, : len(c)], kv[:, len(c) :]
            z = []
            for h in range(heads):
                cut = slice(h * d, (h + 1) * d)
                weight = torch.softmax(k[:, cut] @ q[cut] / math.sqrt(d), 0)
                z.append(weight @ v[:, cut])
            c = c + layer.ls1(attn.proj(torch.cat(z)))
            c = c + layer.ls2(layer.mlp(layer.norm2(c)))
        out.append(c)
    return torch.stack(out)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.5}])
@torch.no_grad()
def test_decoder_is_the_recursion(options):
    made = decoder(**options)
    states, layout = states_of()
    expected = slow_decode(made, [x for x, _ in states])
    torch.testing.assert_close(made.decode(states), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made(states, layout), made.fc(made.norm(expected)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_registers_are_not_read():
    made = decoder()
    states, _ = states_of(prefix=(("register", 2),))
    changed = [(torch.cat([torch.randn_like(x[:, :2]), x[:, 2:]], 1), layout) for x, layout in states]
    assert torch.equal(made.decode(states), made.decode(changed))
    expected = slow_decode(made, [x[:, 2:] for x, _ in states])
    torch.testing.assert_close(made.decode(states), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_is_not_read_and_merged_tokens_count_by_size():
    made = decoder()
    states, layout = states_of()
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 7:] = False
    padded = [(x, layout.replace(valid=valid)) for x, _ in states]
    expected = slow_decode(made, [x for x, _ in states], keep=valid)
    torch.testing.assert_close(made.decode(padded), expected, atol=1e-5, rtol=1e-5)
    # two equal patches, and one merged token of size 2 in their place
    twins = [x.clone() for x, _ in states]
    for x in twins:
        x[:, 1] = x[:, 0]
    assign = torch.tensor([0, *range(11)]).expand(2, -1)
    merged = [(x[:, 1:], layout.regroup(assign, 11)) for x in twins]
    whole = [(x, layout) for x in twins]
    torch.testing.assert_close(made.decode(merged), made.decode(whole), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_maps_sum_to_one_and_do_not_change_the_result():
    made = decoder()
    states, _ = states_of()
    maps = made.maps(states)
    assert [m.shape for m in maps] == [(2, 2, 12)] * 3
    for m in maps:
        torch.testing.assert_close(m.sum(-1), torch.ones(2, 2))
    found: list[torch.Tensor] = []
    torch.testing.assert_close(made._decode(states, None, found), made.decode(states), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_align_picks_the_states():
    states, _ = states_of(depth=4)
    post, pre = decoder(), decoder(align="pre")
    assert torch.equal(post.decode(states), post.decode(states[1:]))
    assert torch.equal(pre.decode(states), post.decode(states[:-1]))


def test_every_state_is_read_directly():
    made = decoder()
    states, _ = states_of()
    leaves = [(x.clone().requires_grad_(), layout) for x, layout in states]
    made.decode(leaves).sum().backward()
    assert all(bool(x.grad.any()) for x, _ in leaves)


def test_swaps_into_a_host_without_class_token():
    model = tiny_vit(
        img_size=(12, 16), in_chans=3, num_classes=5, embed_dim=16, depth=2, num_heads=2, class_token=False,
        global_pool="avg", reg_tokens=3,
    )  # fmt: skip
    images = torch.rand(2, 3, 12, 16)
    before = copy.deepcopy(model)(images)
    record = swap(model, "readout", EDITDecoder)
    assert model(images).shape == (2, 5)
    assert len(model.read_out.layers) == 2
    record.undo()
    assert torch.equal(model(images), before)


def test_what_a_part_cannot_do_is_refused():
    with pytest.raises(BadInput, match="class_token=False"):
        decoder().decode(states_of(prefix=(("class", 1),))[0])
    with pytest.raises(UnknownName, match="attn"):
        decoder(share="attention")
    with pytest.raises(UnknownName, match="post"):
        decoder(align="past")
    model = tiny_vit(class_token=False, global_pool="avg")
    for options in ({"share": "all"}, {"align": "pre"}):
        with pytest.raises(BadInput, match="from_vit"):
            swap(model, "readout", EDITDecoder, **options)
    with pytest.raises(UnknownName):
        swap(model, "readout", EDITDecoder, share="most")
    with pytest.raises(BadInput, match="got 2 states"):
        decoder().decode(states_of(depth=2)[0])
    with pytest.raises(BadInput, match="tokens before"):
        decoder(align="pre").decode(states_of(depth=3)[0])
    with pytest.raises(BadInput, match="needs the 3 blocks"):
        decoder(share="all").decode(states_of(depth=3)[0])


def test_conforms_without_class_token():
    report = check_part(EDITDecoder)
    assert set(report.refused) == {str(p) for p in PLACES if p.class_token}
    assert all("class_token=False" in reason for reason in report.refused.values())


def test_trains_in_a_small_task():
    made = decoder(classes=2).train()
    states, layout = states_of(batch=32)
    labels = (states[1][0][:, 3, 0] > 0).long()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    first = None
    for _ in range(40):
        loss = F.cross_entropy(made(states, layout), labels)
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3 * first
