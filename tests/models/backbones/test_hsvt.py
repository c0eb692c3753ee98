"""HsVT: streaming equals running at once, memories belong to their sequences, stages are what the paper says."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from vitkit.errors import BadInput
from vitkit.models.backbones.hsvt import STFE, ConvLSTM, HsVT, detach_memory, reset_memory
from vitkit.models.spiking import LIF
from vitkit.testing import check_backbone

MIXES = [("stfe", "stfe", "lstm", "lstm"), ("lstm",) * 4, ("stfe",) * 4, ("none", "lstm", "stfe", "none")]


def small(temporal=MIXES[0], windows=3, seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"dims": (8, 8, 16, 16), "head_dim": 8, "partition_size": 2, "layer_scale": 0.5, "stem_stride": 2}
    net = HsVT(in_chans=2 * windows, windows=windows, num_classes=4, temporal=temporal, **{**sizes, **options})
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                # statistics as after training, and neurons that fire
                module.running_mean.normal_(std=0.1)
                module.bias.normal_(std=0.5)
    return net.eval()


def clip(batch=2, windows=3, height=12, width=10, seed=1):
    return torch.randn(batch, windows, 2, height, width, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("temporal", MIXES)
def test_windows_one_by_one_are_windows_at_once(temporal):
    net, x = small(temporal), clip(windows=5)
    at_once = net(x)
    memory, maps = None, ()
    for window in x.unbind(1):
        maps, memory = net.stream(window, memory)
    assert torch.allclose(net.forward_head(net.norm(maps[-1])), at_once, atol=1e-5)
    first, state = net.stream(x[:, :2])
    second, state = net.stream(x[:, 2:], state)
    assert all(torch.allclose(s[:, -1], m, atol=1e-5) for s, m in zip(second, maps))
    assert all(torch.allclose(a, b, atol=1e-5) for old, new in zip(state, memory) for a, b in zip(old, new))
    assert first[0].shape == (2, 2, 8, 6, 5)


def test_windows_are_cut_from_the_channels_the_oldest_first():
    net, x = small(), clip()
    assert torch.equal(net(x.flatten(1, 2)), net(x))
    assert not torch.allclose(net(x), net(x.flip(1)))


def test_without_memory_only_the_last_window_counts():
    net, x = small(("none",) * 4), clip()
    y = x.clone()
    y[:, :-1] = 0
    assert torch.allclose(net(x), net(y), atol=1e-6)
    other = small()
    assert not torch.allclose(other(x), other(y), atol=1e-4)


def test_a_reset_isolates_sequences():
    net, x = small(), clip(batch=3, windows=4)
    _, memory = net.stream(x[:, :2])
    starts = torch.tensor([False, True, False])
    maps, after = net.stream(x[:, 2:], memory, starts)
    fresh, _ = net.stream(x[1:2, 2:])
    whole, _ = net.stream(x)
    assert torch.allclose(maps[-1][1:2], fresh[-1], atol=1e-5)
    assert torch.allclose(maps[-1][[0, 2]], whole[-1][[0, 2], 2:], atol=1e-5)
    assert not torch.allclose(maps[-1][1], whole[-1][1, 2:], atol=1e-4)
    # what one sequence sees changes nothing in another
    changed = x.clone()
    changed[0] += 1
    assert torch.allclose(net(changed)[1:], net(x)[1:], atol=1e-5)
    with pytest.raises(BadInput, match=r"\(3,\), not \(2,\)"):
        reset_memory(after, torch.tensor([True, False]))


def test_training_goes_through_time_and_is_cut_where_asked():
    net, x = small().train(), clip(windows=4).requires_grad_()
    _, memory = net.stream(x[:, :2])
    net.stream(x[:, 2:], memory)[0][-1].square().sum().backward()
    assert (x.grad[:, 0] != 0).any()
    x.grad = None
    _, memory = net.stream(x[:, :2])
    net.stream(x[:, 2:], detach_memory(memory))[0][-1].square().sum().backward()
    assert (x.grad[:, :2] == 0).all() and (x.grad[:, 2:] != 0).any()


def test_all_parameters_learn():
    net = small().train()
    net(clip()).square().sum().backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert silent == []


def test_stfe_is_two_convolutions_around_neurons():
    torch.manual_seed(0)
    block, x = STFE(6).eval(), torch.randn(4, 2, 6, 5, 7) * 3
    out, (u, s) = block(x, None)
    memory = None
    for t in range(4):
        current = block.norm1(block.conv1(x[t]))
        spikes, memory = block.lif(current[None], memory)
        assert set(spikes.unique().tolist()) <= {0.0, 1.0}
        assert torch.allclose(out[t], x[t] + block.norm2(block.conv2(spikes[0])), atol=1e-5)
    assert torch.allclose(u, memory[0], atol=1e-5) and torch.equal(s, memory[1])


def test_convlstm_follows_its_equations():
    torch.manual_seed(0)
    cell, x = ConvLSTM(4), torch.randn(3, 2, 4, 5, 6)
    out, (h_end, c_end) = cell(x, None)
    h = c = torch.zeros(2, 4, 5, 6)
    weight = torch.cat([cell.gates_x.weight, cell.gates_h.weight], 1)
    for t in range(3):
        both = torch.cat([x[t], cell.mix(h)], 1)
        i, f, o, g = nn.functional.conv2d(both, weight, cell.gates_x.bias).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        assert torch.allclose(out[t], h, atol=1e-5)
    assert torch.allclose(h_end, h, atol=1e-5) and torch.allclose(c_end, c, atol=1e-5)


def test_attention_stays_in_its_group_and_pads_are_no_keys():
    net = small(("none",) * 4)
    block, grid = net.stages[0].blocks
    x = torch.randn(1, 8, 5, 7)
    changed = x.clone()
    changed[0, :, 0, 0] = 5 * torch.randn(8)
    for module, members in ((block, {(i, j) for i in range(2) for j in range(2)}), (grid, None)):
        moved = ((module(changed) - module(x)).abs().sum(1)[0] > 1e-6).nonzero().tolist()
        found = {(i, j) for i, j in moved}
        # 5×7 cells in groups of 2×2: the grid's partners lie 3 rows and 4 columns apart
        assert found == (members if members is not None else {(0, 0), (3, 0), (0, 4), (3, 4)})
    # a map that had to be padded gives the cells of whole groups what the whole map gives them
    assert torch.allclose(block(x)[:, :, :4, :6], block(x[:, :, :4, :6]), atol=1e-5)


@pytest.mark.parametrize("size", [28, 8])
def test_timm_contract(size):
    check_backbone("hsvt_femto", image_size=size, img_size=size)


@pytest.mark.parametrize(
    ("name", "dims"), [("tiny", (32, 64, 128, 256)), ("small", (48, 96, 192, 384)), ("base", (64, 128, 256, 512))]
)
def test_published_sizes(name, dims):
    with torch.device("meta"):
        net = timm.create_model(f"hsvt_{name}", in_chans=20)
    assert [f["num_chs"] for f in net.feature_info] == list(dims)
    assert [f["reduction"] for f in net.feature_info] == [4, 8, 16, 32]
    assert [type(s.temporal) for s in net.stages] == [STFE, STFE, ConvLSTM, ConvLSTM]
    lif = net.stages[0].temporal.lif
    assert isinstance(lif, LIF) and (lif.tau, lif.threshold, lif.alpha, lif.reset) == (2, 1, 2, "hard")


def test_features_only_gives_the_last_windows_maps():
    net = timm.create_model("hsvt_femto", in_chans=6, windows=3, features_only=True).eval()
    assert [tuple(m.shape) for m in net(torch.rand(2, 6, 32, 32))] == [
        (2, 16, 16, 16),
        (2, 32, 8, 8),
        (2, 64, 4, 4),
        (2, 128, 2, 2),
    ]


def test_bfloat16_and_one_graph():
    net, x = small(), clip()
    out = net(x)
    assert torch.allclose(torch.compile(net, fullgraph=True, backend="eager")(x), out, atol=1e-5)
    low = copy.deepcopy(net).to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


def test_errors_name_what_works():
    with pytest.raises(BadInput, match=r"windows=4 does not divide the 6 channels.*windows=3"):
        HsVT(in_chans=6, windows=4)
    with pytest.raises(BadInput, match="temporal"):
        HsVT(temporal=("stfe", "gru", "lstm", "lstm"))
    with pytest.raises(BadInput, match="head_dim=24"):
        HsVT(head_dim=24)
    net = small()
    with pytest.raises(BadInput, match=r"\(B, 6, H, W\)"):
        net(torch.rand(1, 4, 8, 8))
    with pytest.raises(BadInput, match="windows of 2 channels"):
        net.stream(torch.rand(1, 6, 8, 8))
    _, memory = net.stream(clip(batch=2))
    with pytest.raises(BadInput, match="start a new"):
        net.stream(clip(batch=3), memory)
