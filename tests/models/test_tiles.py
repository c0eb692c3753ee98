"""Tiles: exact for convolutions with a wide enough halo, the identity for one tile, every cell once."""

from __future__ import annotations

import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import multiprocessing, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.tiles import Tiles, _Axis, tiles


class Conv(nn.Module):
    """Two 3×3 convolutions (radius 2), then m-fold upsampling by shuffling."""

    patch_size = 1

    def __init__(self, scale: int = 2, cyclic: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3 * scale**2, 3)
        self.scale, self.cyclic = scale, cyclic

    def pad(self, x):
        x = F.pad(x, (1, 1, 0, 0), mode="circular") if self.cyclic else F.pad(x, (1, 1, 0, 0))
        return F.pad(x, (0, 0, 1, 1))

    def forward(self, x, shift=None):
        y = F.pixel_shuffle(self.two(self.pad(torch.tanh(self.one(self.pad(x))))), self.scale)
        return y if shift is None else y + shift[:, None, None, None]


def global_model(x):
    """Every output cell depends on every input cell."""
    return x.cumsum(-1).cumsum(-2) * x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize(("div", "halo"), [(2, 2), (4, 2), ((3, 2), (2, 2)), ((1, 4), 1), (3, 5)])
def test_a_convolution_is_reproduced_with_a_halo_as_wide_as_it_sees(div, halo):
    model = Conv()
    x = torch.randn(2, 2, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(tiles(model, div, halo)(x), model(x), atol=1e-6, rtol=1e-6)


def test_a_smaller_halo_shows_seams_at_the_inner_borders_only():
    model = Conv(scale=1)
    x = torch.randn(1, 2, 16, 16)
    with torch.no_grad():
        gap = (tiles(model, 2, (1, 1))(x) - model(x)).abs().amax((0, 1))
    assert bool((gap[7:9] > 0).any()) and bool((gap[:, 7:9] > 0).any())
    assert float(gap[:7, :7].max()) < 1e-6 and float(gap[9:, 9:].max()) < 1e-6


def test_one_tile_is_the_model_itself():
    x = torch.randn(2, 3, 7, 9)
    wrapped = Tiles(nn.Identity(), div=1)
    wrapped.model = type("Global", (nn.Module,), {"forward": lambda self, x: global_model(x)})()
    assert torch.equal(wrapped(x), global_model(x))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(0, 7), st.integers(1, 4), st.booleans(), st.integers(1, 3)
)  # fmt: skip
def test_every_output_cell_comes_from_its_own_place_once(length, parts, halo, multiple, cyclic, scale):
    try:
        axis = _Axis(length, parts, halo, multiple, cyclic)
    except BadInput:
        assert parts > length or length % multiple
        return
    cells, device = axis.cells(torch.device("cpu")), torch.device("cpu")
    assert len(cells) == parts * axis.size and axis.size % multiple == 0
    fine = (cells[:, None] * scale + torch.arange(scale)).flatten()
    kept = axis.kept(scale, device)
    assert torch.equal(fine[kept], torch.arange(length * scale)) and len(kept.unique()) == length * scale
    # the halo is there on both sides, or the field ends
    for tile in range(parts):
        window = set(cells[tile * axis.size : (tile + 1) * axis.size].tolist())
        wanted = range(axis.borders[tile] - halo, axis.borders[tile + 1] + halo)
        if cyclic and parts > 1:
            assert len(window) == length or {c % length for c in wanted} <= window
        else:
            assert set(wanted) & set(range(length)) <= window or parts == 1


def test_windows_have_the_papers_places():
    axis = _Axis(32, 4, 3, 1, False)
    # inner tiles reach to both sides, those at the edges twice as far inward
    assert axis.size == 8 + 6 and axis.starts == [0, 5, 13, 18]
    wrapped = Tiles(Conv(), div=4, halo=3)
    assert wrapped.halo == (3, 6)


def test_longitude_may_be_a_circle():
    model = Conv(scale=1, cyclic=True)
    x = torch.randn(1, 2, 12, 24)
    with torch.no_grad():
        torch.testing.assert_close(tiles(model, (2, 3), 2, cyclic=True)(x), model(x), atol=1e-6, rtol=1e-6)
        assert not torch.allclose(tiles(model, (2, 3), 2)(x)[..., :1], model(x)[..., :1], atol=1e-3)


def test_chunks_gradients_and_arguments():
    model, x = Conv(), torch.randn(3, 2, 12, 12, requires_grad=True)
    shift = torch.tensor([0.0, 5.0, 9.0])
    whole = tiles(model, 3, 2)(x, shift=shift)
    torch.testing.assert_close(tiles(model, 3, 2, chunk=4)(x, shift=shift), whole)
    torch.testing.assert_close(whole, model(x, shift=shift), atol=1e-6, rtol=1e-6)
    weight = torch.randn_like(whole)
    (gradient,) = torch.autograd.grad((whole * weight).sum(), x)
    (expected,) = torch.autograd.grad((model(x) * weight).sum(), x)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


def test_refusals():
    x = torch.zeros(1, 2, 9, 12)
    with pytest.raises(BadInput, match="more tiles than the 9 cells"):
        tiles(Conv(), 10, 0)(x)
    with pytest.raises(BadInput, match="cut the field to 8 cells"):
        tiles(Conv(), 2, 8, multiple=4)(x)
    with pytest.raises(BadInput, match="whole m"):
        tiles(nn.AvgPool2d(2), 2, 1)(torch.zeros(1, 2, 8, 8))
    with pytest.raises(BadInput, match="at least 1"):
        tiles(Conv(), 0)


def _worker(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, calls = Conv(), []
    model.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    x = torch.randn(3, 2, 12, 12, generator=torch.Generator().manual_seed(1))
    # 3 × 3 tiles of 3 samples are 27 windows: 14 a process, one of them twice
    y = tiles(model, 3, 2, spread=True)(x, shift=torch.tensor([0.0, 5.0, 9.0]))
    y.square().mean().backward()
    torch.save((y.detach(), [p.grad for p in model.parameters()], calls), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_windows(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    model = Conv()
    x = torch.randn(3, 2, 12, 12, generator=torch.Generator().manual_seed(1))
    expected = model(x, shift=torch.tensor([0.0, 5.0, 9.0]))
    expected.square().mean().backward()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for y, _, calls in found:
        torch.testing.assert_close(y, expected.detach(), atol=1e-6, rtol=1e-6)
        assert calls == [14]
    for a, b, p in zip(found[0][1], found[1][1], model.parameters()):
        # averaged as DistributedDataParallel does, it is the gradient of one process
        torch.testing.assert_close((a + b) / 2, p.grad, atol=1e-5, rtol=1e-5)
