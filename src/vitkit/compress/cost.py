"""What a model costs: parameters, operations, bytes, time and working memory, each counted or measured one way.

Parameters, FLOPs and bytes are *counted*; latency and peak memory are *measured* on the machine at hand, in eager
PyTorch. Nothing here is modelled.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitkit.anatomy.untouched import untouched
from vitkit.errors import BadInput


def count_params(model: nn.Module) -> int:
    """Number of weights of a model, shared ones once.

    A weight kept as an integer code counts like any other: quantization makes weights smaller, not fewer.

    >>> count_params(nn.Linear(3, 2))
    8
    """
    coded = sum(int(m.codes.numel()) for m in model.modules() if _is_packed(m))
    return coded + sum(p.numel() for p in model.parameters())


def size_bytes(model: nn.Module) -> int:
    """Bytes needed to store the model: parameters and persistent buffers as they are, integer codes bit-packed.

    >>> size_bytes(nn.Linear(3, 2))
    32

    A quantized layer gives its own figure (``packed_bytes()``): 4-bit codes count half a byte each, scales, zero points
    and index lists in full. It is what a packed file needs; in memory every code takes one byte.
    """
    total = 0
    seen: set[int] = set()
    for module in model.modules():
        if _is_packed(module):
            total += int(module.packed_bytes())
            continue
        skipped: set[str] = module._non_persistent_buffers_set
        own: list[Tensor] = [p for p in module._parameters.values() if p is not None]
        own += [b for name, b in module._buffers.items() if b is not None and name not in skipped]
        for tensor in own:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                total += tensor.numel() * tensor.element_size()
    return total


def count_flops(model: nn.Module, images: Tensor) -> int:
    """Floating-point operations of one forward on ``images`` (B, C, H, W), for the whole batch.

    Matrix products and convolutions only, a multiply-add as two operations; attention is counted as its two matrix
    products, whichever kernel runs it. The model is left as found.
    """
    # the fused CPU kernel is unknown to the counter and would count as nothing; the plain one is two matmuls
    with untouched(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return int(counter.get_total_flops())


def measure_latency(
    models: Mapping[str, Callable[[Tensor], Any]], images: Tensor, repeats: int = 50, warmup: int = 10
) -> dict[str, tuple[float, float, float]]:
    """Time one call of each model on the same batch, the models taking turns: A, B, C, A, B, C, …

    Taking turns makes a slow phase of the machine hit all alike; the ratio is therefore the median over rounds of
    ``time / time of the first model in the same round``, which drift does not move.

    Args:
        models: name → module or function of the batch; the first is the baseline of the ratios.
        images: (B, C, H, W), on the models' device.
        repeats: timed rounds.
        warmup: untimed rounds before them.

    Returns: name → (median in ms, 95th percentile in ms, ratio to the first model).

    Raises: BadInput if there is no model or no round.
    """
    if not models or repeats < 1 or warmup < 0:
        raise BadInput(
            f"measure_latency got {len(models)} models, repeats={repeats}, warmup={warmup}; it needs at least one "
            "model, one timed round and no negative warm-up."
        )
    times = np.empty((repeats, len(models)))
    with ExitStack() as stack:
        for module in {id(m): m for m in models.values() if isinstance(m, nn.Module)}.values():
            stack.enter_context(untouched(module))
        stack.enter_context(torch.inference_mode())
        for round_index in range(-warmup, repeats):
            for column, call in enumerate(models.values()):
                _synchronise(images)
                started = time.perf_counter()
                call(images)
                _synchronise(images)
                if round_index >= 0:
                    times[round_index, column] = time.perf_counter() - started
    ratios = np.median(times / times[:, :1], axis=0)
    return {
        name: (
            float(np.median(times[:, i]) * 1000),
            float(np.quantile(times[:, i], 0.95) * 1000),
            float(ratios[i]),
        )
        for i, name in enumerate(models)
    }


def peak_memory(fn: Callable[..., Any], *args: Any) -> int:
    """Bytes that must be free to call ``fn(*args)``: the module's own tensors plus what the call allocates at its peak.

    What the call allocates is followed allocation by allocation: on CUDA by the allocator's peak counter, on the CPU by
    the profiler's memory events. The process's resident size is no measure: it keeps pages that were freed long ago and
    counts everything else that is loaded. Work space that a library takes from the system behind PyTorch's back (MKL,
    oneDNN) is not seen.

    Args:
        fn: a module (run in eval mode without gradients, left as found) or any function.
        args: given to it; their own bytes are not counted.

    >>> layer = nn.Linear(256, 256, bias=False)
    >>> peak_memory(layer, torch.zeros(64, 256)) == 256 * 256 * 4 + 64 * 256 * 4
    True
    """
    owned = 0
    with ExitStack() as stack:
        if isinstance(fn, nn.Module):
            stack.enter_context(untouched(fn))
            owned = sum(t.numel() * t.element_size() for t in _own_tensors(fn))
        stack.enter_context(torch.inference_mode())
        fn(*args)  # lazily built tables and kernel choices are made before the call that counts
        cuda = next((t.device for t in (*args, *_tensors_of(fn)) if isinstance(t, Tensor) and t.is_cuda), None)
        if cuda is None:
            return owned + _cpu_peak(fn, args)
        torch.cuda.synchronize(cuda)
        before = torch.cuda.memory_allocated(cuda)
        torch.cuda.reset_peak_memory_stats(cuda)
        fn(*args)
        torch.cuda.synchronize(cuda)
        return owned + torch.cuda.max_memory_allocated(cuda) - before


def _cpu_peak(fn: Callable[..., Any], args: tuple[Any, ...]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        result = fn(*args)
    # freed only after the recording has stopped, so that the output counts as alive at the end
    del result
    events = [e for e in recording.profiler.kineto_results.events() if e.name() == "[memory]"]
    running = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The profiler's library writes its own log to stderr, which would tear up a progress display."""
    variable = "KINETO_LOG_LEVEL"
    given = os.environ.get(variable)
    if given is None:
        os.environ[variable] = "99"
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(variable, None)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _tensors_of(fn: Callable[..., Any]) -> Iterator[Tensor]:
    if isinstance(fn, nn.Module):
        yield from _own_tensors(fn)


def _is_packed(module: nn.Module) -> bool:
    return callable(getattr(module, "packed_bytes", None)) and isinstance(getattr(module, "codes", None), Tensor)


def _synchronise(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
