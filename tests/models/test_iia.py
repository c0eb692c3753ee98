"""iiA on maps: its attention against a loop, registers that count, what each branch sees."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.iia import IIA, ChannelGate, RegisterAttention


def attention(registers=2, scaled=True, size=(2, 3), heads=2):
    torch.manual_seed(0)
    made = RegisterAttention(4, heads, size, registers, scaled)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.7)
    return made


def x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scaled", [True, False])
def test_attention_is_the_papers_equation(scaled):
    made, image = attention(scaled=scaled), x(1, 4, 2, 3)
    q, k, v = made.qkv(image)[0].flatten(1).T.split(4, 1)
    expected = image[0].flatten(1).T.clone()
    for h in range(2):
        d = slice(2 * h, 2 * h + 2)
        for i in range(6):
            logits, values = [], []
            for j in range(6):
                r = made.rel_h[h, :, j // 3, 0] + made.rel_w[h, :, 0, j % 3]
                logits.append(q[i, d] @ k[j, d] + q[i, d] @ r)
                values.append(v[j, d])
            for n in range(2):
                logits.append(q[i, d] @ made.register_kv[0, h, n])
                values.append(made.register_kv[1, h, n])
            scale = 2**-0.5 if scaled else 1.0
            expected[i, d] += (torch.stack(logits) * scale).softmax(0) @ torch.stack(values)
    torch.testing.assert_close(made(image)[0].flatten(1).T, expected)


def test_registers_whose_logits_are_minus_infinity_are_not_there():
    with_them, without = attention(2), attention(0)
    without.load_state_dict({k: v for k, v in with_them.state_dict().items() if k != "register_kv"})
    image = x(2, 4, 2, 3)
    q, k, v = with_them.heads(image)
    logits = q @ k.transpose(2, 3) * 2**-0.5
    logits[..., 6:] = -torch.inf
    z = (logits.softmax(-1) @ v).transpose(2, 3).reshape(image.shape)
    torch.testing.assert_close(image + z, without(image))
    assert not torch.allclose(with_them(image), without(image), atol=1e-2)


def test_registers_get_a_gradient():
    made = IIA(16, (2, 12, 2), 1, (4, 4), registers=3)
    made(x(2, 16, 4, 4)).square().sum().backward()
    grad = made.branches[2].body[0].register_kv.grad
    assert bool((grad.abs().amax((1, 3)) > 0).all()), "keys and values of every register"


def test_relative_terms_interpolate_to_other_sizes():
    made = attention(size=(4, 6))
    same = (made.rel_h + made.rel_w).flatten(2).transpose(1, 2)
    assert torch.equal(made.relative(4, 6), same)
    # half as many cells: the mean of two neighbours
    rows, columns = made.rel_h.unflatten(2, (2, 2)).mean(3), made.rel_w.unflatten(3, (3, 2)).mean(4)
    torch.testing.assert_close(made.relative(2, 3), (rows + columns).flatten(2).transpose(1, 2))
    with torch.no_grad():
        made.rel_h.fill_(2), made.rel_w.fill_(1)
    torch.testing.assert_close(made.relative(9, 5), torch.full((2, 45, 2), 3.0))
    assert made(x(1, 4, 9, 5)).shape == (1, 4, 9, 5)


def test_output_channels_are_the_sum_of_the_branches():
    for size in ((5, 7), (1, 1), (4, 4)):
        assert IIA(24, (5, 9, 2), 3, (4, 4)).eval()(x(2, 24, *size)).shape == (2, 16, *size)


def test_branches_see_their_share_and_the_dilated_one_five_by_five_cells():
    torch.manual_seed(0)
    made = IIA(16, (2, 12, 2), 1, (9, 9)).eval()
    # ReLU could hide a path
    for branch in made.branches:
        torch.nn.init.constant_(branch.shortcut[1].bias, 100.0)
    image = x(1, 16, 9, 9).requires_grad_()
    out = made(image)
    shares = (slice(0, 2), slice(2, 14), slice(14, 16))
    reach = []
    for own in shares:
        (grad,) = torch.autograd.grad(out[0, own, 4, 4].sum(), image, retain_graph=True)
        seen = grad[0] != 0
        assert bool(seen[own].any()) and all(not seen[other].any() for other in shares if other != own)
        rows, columns = seen[own].any(0).nonzero().T
        reach.append((int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1))
        if own == shares[0]:
            # nine taps, two cells apart
            assert int(seen[own].any(0).sum()) == 9 and bool(seen[own].any(0)[2::2, 2::2][:3, :3].all())
    assert reach == [(5, 5), (3, 3), (9, 9)]


def test_a_block_is_three_branches_with_a_shortcut_each():
    torch.manual_seed(0)
    made, image = IIA(16, (3, 5, 4), 1, (4, 4)).eval(), x(2, 16, 4, 4)
    one, two, three = image.split((2, 12, 2), 1)
    dilated, bottleneck, attended = made.branches

    def bn(conv, value, **options):
        return conv[1](F.conv2d(value, conv[0].weight, **options))

    expected = [F.relu(bn(dilated.body, one, padding=2, dilation=2) + bn(dilated.shortcut, one))]
    wide = F.relu(bn(bottleneck.body[0], two))
    assert wide.shape[1] == 20
    mixed = F.relu(bn(bottleneck.body[2], wide, padding=1, groups=20))
    expected.append(F.relu(bn(bottleneck.body[4], mixed) + bn(bottleneck.shortcut, two)))
    found = attended.body[0](three)
    expected.append(F.relu(bn(attended.body[1], found) + bn(attended.shortcut, three)))
    torch.testing.assert_close(made(image), torch.cat(expected, 1))


def test_branches_can_be_left_out():
    assert len(IIA(16, (4, 12, 0), split=(1, 3, 0)).branches) == 2
    made = IIA(16, (0, 0, 16), 2, (3, 3), split=(0, 0, 1)).eval()
    assert len(made.branches) == 1 and made(x(1, 16, 3, 3)).shape == (1, 16, 3, 3)


def test_the_gate_weighs_channels_by_the_means_of_all():
    gate, image = ChannelGate(3), x(2, 3, 4, 5)
    weight = (image.mean((2, 3)) @ gate.conv.weight[:, :, 0, 0].T).sigmoid()
    torch.testing.assert_close(gate(image), image * weight[:, :, None, None])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_dim": 12}, "multiple of 8"),
        ({"outs": (2, 0, 2)}, "positive where"),
        ({"num_heads": 3}, "use one of \\[1, 2\\]"),
        ({"registers": -1}, "0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(BadInput, match=words):
        IIA(**{"in_dim": 16, "outs": (2, 12, 2), "num_heads": 1, "size": (4, 4), **options})
