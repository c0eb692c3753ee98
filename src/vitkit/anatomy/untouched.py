"""Leave a model exactly as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module, params_grad: bool = False) -> Iterator[nn.Module]:
    """Work on ``model`` in eval mode and put everything back, also after an exception.

    Restored on exit: training mode of every module, ``requires_grad`` and ``.grad`` of every parameter, buffers
    (running statistics), the ``fused_attn`` flag of attention layers, hooks added meanwhile, active taps, and the CPU
    and CUDA random generators. Weights must not be changed inside; their version counters are checked.

    Args:
        model: any module.
        params_grad: True keeps ``requires_grad`` as it is inside (for probes that need parameter gradients);
            the default freezes parameters, so that backward computes input gradients only.

    Raises: RuntimeError on exit if a parameter was modified in place.
    """
    modules = list(model.modules())
    modes = [m.training for m in modules]
    hooks = [
        (m, {n: dict(getattr(m, n)) for n in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")})
        for m in modules
    ]
    flags = [(m, m.fused_attn) for m in modules if hasattr(m, "fused_attn")]
    taps = [(m, m.taps) for m in modules if isinstance(getattr(m, "taps", None), tuple)]
    params = [(p, p.requires_grad, p.grad, p._version) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    # a module may also put a new tensor in a buffer's place
    places = [(m, dict(m._buffers)) for m in modules]
    cpu_state = torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    model.eval()
    for p, *_ in params:
        p.grad = None
        if not params_grad:
            p.requires_grad_(False)
    try:
        yield model
    finally:
        for m, mode in zip(modules, modes):
            m.training = mode
        for m, saved in hooks:
            for name, old in saved.items():
                current = getattr(m, name)
                for key in [k for k in current if k not in old]:
                    del current[key]
        for m, flag in flags:
            m.fused_attn = flag
        for m, old_taps in taps:
            m.taps = old_taps
        for p, requires_grad, grad, _ in params:
            p.requires_grad_(requires_grad)
            p.grad = grad
        for m, held in places:
            m._buffers.update(held)
        with torch.no_grad():
            for buffer, old_buffer in buffers:
                if not torch.equal(buffer, old_buffer):
                    buffer.copy_(old_buffer)
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state_all(cuda_state)
    changed = [i for i, (p, _, _, version) in enumerate(params) if p._version != version]
    if changed:
        names = [name for i, (name, _) in enumerate(model.named_parameters()) if i in changed]
        raise RuntimeError(f"A probe changed the weights {names[:3]}; probes must work on a copy.")
