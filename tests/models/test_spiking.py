"""Spiking neurons: the equation step by step, limits, the surrogate, and what a model of their energy promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vitkit.errors import BadInput
from vitkit.models.backbones.hsvt import STFE, HsVT
from vitkit.models.diagnostics.spike_energy import (
    ACCUMULATE_PJ,
    MAC_PJ,
    SpikeEnergy,
    competition_energy,
    count_spikes,
    spike_energy,
    spiking_layer,
)
from vitkit.models.spiking import LIF, spike, surrogate_slope


def currents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("reset", ["hard", "none"])
def test_neurons_follow_the_equation(reset):
    lif, current = LIF(tau=2.5, threshold=0.7, reset=reset), currents(6, 3, 4)
    spikes, (u_last, s_last) = lif(current)
    for b in range(3):
        for j in range(4):
            u, s = 0.0, 0.0
            for t in range(6):
                u = (1 - 1 / 2.5) * u * ((1 - s) if reset == "hard" else 1) + float(current[t, b, j]) / 2.5
                s = float(u >= 0.7)
                assert float(spikes[t, b, j]) == s
            assert float(u_last[b, j]) == pytest.approx(u, abs=1e-5) and float(s_last[b, j]) == s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spikes_are_exactly_zero_or_one(dtype):
    spikes, (u, _) = LIF()(currents(5, 64).to(dtype))
    assert spikes.dtype == dtype and set(spikes.float().unique().tolist()) == {0.0, 1.0}
    assert u.dtype == torch.float32


def test_without_memory_a_neuron_is_a_threshold():
    current = currents(7, 50)
    spikes, _ = LIF(tau=1, threshold=1, reset="none")(current)
    assert torch.equal(spikes, (current >= 1).float())


def test_steps_in_pieces_are_steps_at_once():
    lif, current = LIF(), currents(9, 20)
    whole, end = lif(current)
    first, state = lif(current[:4])
    second, state = lif(current[4:], state)
    assert torch.equal(torch.cat([first, second]), whole) and torch.equal(state[0], end[0])


def test_the_surrogate_is_the_slope_of_an_arctangent_and_used_backward_only():
    x = torch.linspace(-3, 3, 25, dtype=torch.float64, requires_grad=True)
    out = spike(x, 2.0)
    assert torch.equal(out, (x >= 0).double())
    (slope,) = torch.autograd.grad(out.sum(), x)
    smooth = torch.atan(math.pi * 2.0 * x / 2) / math.pi
    assert torch.allclose(slope, torch.autograd.grad(smooth.sum(), x)[0])
    wide = torch.linspace(-500, 500, 1_000_001, dtype=torch.float64)
    assert float(torch.trapezoid(surrogate_slope(wide), wide)) == pytest.approx(1, abs=2e-3)


def test_gradients_reach_the_first_step():
    current = currents(5, 8).requires_grad_()
    LIF()(current)[0][-1].sum().backward()
    assert (current.grad[0] != 0).any()


@pytest.mark.parametrize("options", [{"tau": 0.5}, {"threshold": 0}, {"alpha": -1}, {"reset": "soft"}])
def test_options_out_of_range_are_named(options):
    with pytest.raises(BadInput, match=next(iter(options))):
        LIF(**options)


def test_a_state_of_another_batch_is_refused():
    _, state = LIF()(currents(2, 3, 4))
    with pytest.raises(BadInput, match=r"\(3, 4\).*state=None"):
        LIF()(currents(2, 5, 4), state)


# -- energy ------------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    spike_fed = {"second": "lif"}

    def __init__(self):
        super().__init__()
        self.first, self.lif, self.second = nn.Linear(10, 20, bias=False), LIF(), nn.Linear(20, 5, bias=False)

    def forward(self, x):
        return self.second(self.lif(self.first(x).unsqueeze(0))[0][0])


def test_energy_counts_macs_and_spikes_times_fan_out():
    torch.manual_seed(0)
    net, x = Toy(), torch.randn(8, 10) * 4
    spikes = net.lif(net.first(x).unsqueeze(0))[0].detach()
    found = spike_energy(net, x)
    assert found.macs == 200 and found.dense_macs == 100
    assert found.accumulates == pytest.approx(float(spikes.sum()) / 8 * 5, rel=1e-5)
    assert found.picojoules == pytest.approx(MAC_PJ * 200 + ACCUMULATE_PJ * found.accumulates)
    assert found.firing_rate == pytest.approx(float(spikes.mean())) and found.tag == "modelled"
    assert net.lif.record is None


def test_energy_rises_with_the_firing_rate():
    joules = [SpikeEnergy(macs=100, accumulates=spiking_layer(1000, r)).picojoules for r in (0, 0.1, 0.5, 1)]
    assert joules == sorted(joules) and len(set(joules)) == 4
    with pytest.raises(BadInput, match=r"1\.2"):
        spiking_layer(1000, 1.2)


def test_a_network_whose_neurons_fire_less_needs_less():
    torch.manual_seed(0)
    net = HsVT(in_chans=4, windows=2, num_classes=3, dims=(8, 8), head_dim=8, temporal=("stfe", "stfe")).eval()
    images, rates, joules = torch.rand(2, 4, 16, 16), [], []
    for threshold in (0.2, 0.6, 1.2):
        for module in net.modules():
            if isinstance(module, LIF):
                module.threshold = threshold
        found = spike_energy(net, images)
        rates.append(found.firing_rate)
        joules.append(found.picojoules)
    assert rates[0] > rates[1] > rates[2] and joules[0] > joules[1] > joules[2]
    assert joules[0] < found.dense_picojoules


def test_only_the_layer_behind_the_neurons_is_counted_as_spiking():
    torch.manual_seed(0)

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.stfe = STFE(4)

        def forward(self, x):
            return self.stfe(x.unsqueeze(0), None)[0]

    found = spike_energy(Alone().eval(), torch.randn(2, 4, 6, 6))
    assert found.macs == found.dense_macs == 6 * 6 * 4 * 4 * 9


def test_rates_are_recorded_only_inside():
    lif = LIF()
    with count_spikes(lif) as rates:
        lif(currents(3, 5))
        lif(currents(3, 5))
    lif(currents(3, 5))
    assert len(rates[""]) == 2


def test_competition_energy_is_active_atoms_times_all():
    found = competition_energy(torch.tensor([10.0, 30.0]), torch.tensor([5, 5]), num_atoms=8, dim=3)
    assert (found.macs, found.accumulates, found.dense_macs) == (24, 160, 320) and found.firing_rate == 0.5
