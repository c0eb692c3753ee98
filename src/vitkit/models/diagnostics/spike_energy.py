"""What spiking computation would cost on neuromorphic hardware: a model of energy, never a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitkit.anatomy.untouched import untouched
from vitkit.errors import BadInput
from vitkit.models.spiking import LIF

#: picojoules of a 32-bit multiply-accumulate and of an addition, 45 nm CMOS (Horowitz, ISSCC 2014)
MAC_PJ, ACCUMULATE_PJ = 4.6, 0.9


@dataclass(frozen=True, kw_only=True)
class SpikeEnergy:
    """Operations of one image and the energy they stand for.

    Attributes:
        macs: multiply-accumulates of layers with real-valued input.
        accumulates: additions of layers whose input are spikes: spikes × fan-out.
        dense_macs: multiply-accumulates these layers would need without sparsity.
        firing_rates: mean spikes of a neuron and step, by the name of the neurons, in [0, 1].
        tag: "modelled", for reports.
    """

    macs: float
    accumulates: float
    dense_macs: float = 0.0
    firing_rates: dict[str, float] = field(default_factory=dict)
    tag: str = "modelled"

    @property
    def picojoules(self) -> float:
        """``4.6·macs + 0.9·accumulates``."""
        return MAC_PJ * self.macs + ACCUMULATE_PJ * self.accumulates

    @property
    def dense_picojoules(self) -> float:
        """The same network with every operation a multiply-accumulate."""
        return MAC_PJ * (self.macs + self.dense_macs)

    @property
    def firing_rate(self) -> float:
        """Mean over the layers of neurons; 0 without any."""
        return sum(self.firing_rates.values()) / max(1, len(self.firing_rates))


def spiking_layer(macs: float, rate: float) -> float:
    """Accumulates of a layer of ``macs`` multiply-accumulates whose inputs fire with ``rate`` in [0, 1].

    >>> spiking_layer(1000, 0.1)
    100.0

    Raises: BadInput if the rate is no share.
    """
    if not 0 <= rate <= 1:
        raise BadInput(f"A firing rate of {rate} is not possible; spikes per neuron and step lie in [0, 1].")
    return macs * rate


@contextmanager
def count_spikes(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """While active, the firing rate of every call of every :class:`~vitkit.models.spiking.LIF`, by its name."""
    neurons = {name: m for name, m in model.named_modules() if isinstance(m, LIF)}
    before = {name: m.record for name, m in neurons.items()}
    rates: dict[str, list[Tensor]] = {name: [] for name in neurons}
    for name, module in neurons.items():
        module.record = rates[name]
    try:
        yield rates
    finally:
        for name, module in neurons.items():
            module.record = before[name]


def spike_energy(model: nn.Module, images: Tensor) -> SpikeEnergy:
    """Energy of one image: real-valued layers by multiply-accumulates, spike-fed layers by the spikes they really get.

    Counted are matrix products and convolutions of the forward pass, at 4.6 pJ each; a layer that gets nothing but
    spikes needs an addition of 0.9 pJ per spike and outgoing connection. A module says which of its layers those are by
    a class attribute ``spike_fed = {"layer": "neurons"}``. Norms, activations, the neurons' own update and memory
    traffic are not counted, as in the papers that use these two constants: the figure compares networks and is no power
    bill.

    Args:
        model: any network; left as found.
        images: (B, C, H, W) or what it takes.

    Returns: the :class:`SpikeEnergy` of one image (mean over the batch).

    Raises: BadInput if there are no images.
    """
    if not len(images):
        raise BadInput("spike_energy got no images; give at least one.")
    fed = {
        f"{name}.{layer}" if name else layer: f"{name}.{neurons}" if name else neurons
        for name, module in model.named_modules()
        for layer, neurons in getattr(module, "spike_fed", {}).items()
    }
    with untouched(model), torch.no_grad(), count_spikes(model) as recorded, sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            model(images)
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(model).__name__
    rates = {name: float(torch.stack(values).mean()) for name, values in recorded.items() if values}
    # a multiply-accumulate is two floating-point operations
    half = 0.5 / len(images)
    sparse = {layer: half * flops.get(f"{root}.{layer}", 0) for layer in fed}
    return SpikeEnergy(
        macs=half * counter.get_total_flops() - sum(sparse.values()),
        accumulates=sum(spiking_layer(macs, rates.get(fed[layer], 0.0)) for layer, macs in sparse.items()),
        dense_macs=sum(sparse.values()),
        firing_rates=rates,
    )


def competition_energy(active_steps: Tensor, num_steps: Tensor, num_atoms: int, dim: int) -> SpikeEnergy:
    """Energy of sparse coding by competing neurons (see :mod:`vitkit.models.lca`), mean over images.

    The drive ``Φᵀs`` costs d·M multiply-accumulates once; in every step each active neuron inhibits the M others, which
    costs M accumulates.

    Args:
        active_steps: (B,) active neurons summed over all steps. num_steps: (B,) steps run.
        num_atoms: M. dim: d of the signals.
    """
    active = active_steps.double().mean()
    dense = num_steps.double().mean() * num_atoms
    return SpikeEnergy(
        macs=float(dim * num_atoms),
        accumulates=float(active * num_atoms),
        dense_macs=float(dense * num_atoms),
        firing_rates={"atoms": float(active / dense.clamp(min=1))},
    )
