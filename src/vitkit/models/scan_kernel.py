"""The selective scan's inner loop as machine code, three to ten times as fast on a CPU as the one in plain PyTorch.

The first call compiles it with the machine's C compiler, which takes about a second, into ``$VITKIT_CACHE/kernels``,
else ``~/.cache/vitkit/kernels``; without a compiler the one in plain PyTorch runs. ``VITKIT_NATIVE=0`` forbids it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vitkit.files import atomic_write

# B batch · L steps · G groups · n channels of a group · S states · M marks: one state for every `every` steps

#: states per channel that the kernel takes
MOST_STATES = 64
_SOURCE = Path(__file__).with_name("scan_kernel.c")
# contraction makes fused multiply-adds; nothing here may reorder sums or ignore NaN
_FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-shared", "-fPIC")


@lru_cache(maxsize=1)
def reason() -> str:
    """Why the kernel cannot be used; empty if it can. The first call compiles it, which takes about a second."""
    if os.environ.get("VITKIT_NATIVE", "1") == "0":
        return "VITKIT_NATIVE=0 switches it off"
    try:
        _library()
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return ""


def compile_to(path: Path, flags: tuple[str, ...]) -> None:
    """Compile the kernel into a shared library.

    Raises: OSError if there is no C compiler. subprocess.SubprocessError if it fails; the message has its own words.
    """
    done = subprocess.run([*_compiler(), *flags, "-o", str(path), str(_SOURCE)], capture_output=True, timeout=120)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise subprocess.SubprocessError(
            f"{_compiler()[0]} fails on {_SOURCE.name}: {said[0] if said else 'no reason'}"
        )


def _compiler() -> list[str]:
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given] if given else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    raise OSError(f"there is no C compiler ({given[0] if given else 'cc, gcc or clang'})")


def _folder() -> Path:
    return Path(os.environ.get("VITKIT_CACHE", Path.home() / ".cache" / "vitkit")) / "kernels"


def _processor() -> str:
    """What tells apart machines that share a home folder: code for one may be illegal on the other."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {features}"


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        return _load(("-march=native", *_FLAGS))
    except subprocess.SubprocessError:
        # not every compiler knows -march=native
        return _load(_FLAGS)


def _load(flags: tuple[str, ...]) -> ctypes.CDLL:
    key = "\n".join([_SOURCE.read_text(encoding="utf-8"), *_compiler(), *flags, _processor()])
    path = _folder() / f"scan-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        # two processes may compile at once; each renames a whole file into place
        with atomic_write(path) as temporary:
            compile_to(temporary, flags)
    library = ctypes.CDLL(str(path))
    size, pointer = ctypes.c_long, ctypes.c_void_p
    library.scan_forward.argtypes = [size] * 8 + [pointer] * 8
    library.scan_forward.restype = None
    library.scan_backward.argtypes = [size] * 8 + [pointer] * 14
    library.scan_backward.restype = ctypes.c_int
    return library


def forward(
    x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h0: Tensor, every: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the states in front of every ``every``-th step (none unless ``keep``).

    Shape: x, delta (B, L, G·n), A (G, S, n), Bm, Cm (B, L, G, S), h0 (B, G, S, n); all float32 on the CPU
        → (B, L, G·n), (B, G, S, n), (M or 0, B, G, S, n).
    """
    x, delta, Bm, Cm = x.contiguous(), delta.contiguous(), Bm.contiguous(), Cm.contiguous()
    (batch, length, _), (groups, states, n) = x.shape, A.shape
    scaled = (A / _LN2).contiguous()
    y, last = torch.empty_like(x), h0.clone(memory_format=torch.contiguous_format)
    marks = x.new_empty((-(-length // every) if keep else 0, *last.shape))
    tensors = [t.data_ptr() for t in (x, delta, scaled, Bm, Cm, last)] + [
        marks.data_ptr() if keep else None,
        y.data_ptr(),
    ]
    run = _library().scan_forward
    sizes = (states, length, groups, n, every, last.numel())
    _share(lambda first, end: run(first, end, *sizes, *tensors), batch * groups)
    return y, last, marks


def backward(
    x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, marks: Tensor, dy: Tensor, dlast: Tensor, every: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, Bm, Cm and h0, in their shapes; see :func:`forward`."""
    x, delta, Bm, Cm, dy = (t.contiguous() for t in (x, delta, Bm, Cm, dy))
    (batch, length, _), (groups, states, n) = x.shape, A.shape
    A = A.contiguous()
    scaled = A / _LN2
    g_state = dlast.clone(memory_format=torch.contiguous_format)
    dx, dd, dB, dC = torch.empty_like(x), torch.empty_like(x), torch.empty_like(Bm), torch.empty_like(Cm)
    # one for every image: they are computed side by side
    dA = A.new_zeros((batch, *A.shape))
    tensors = [t.data_ptr() for t in (x, delta, scaled, A, Bm, Cm, marks, dy, g_state, dx, dd, dA, dB, dC)]
    run = _library().scan_backward
    sizes = (states, length, groups, n, every, g_state.numel())
    if any(_share(lambda first, end: run(first, end, *sizes, *tensors), batch * groups)):
        raise MemoryError("the gradient of the selective scan found no memory for its work space")
    return dx, dd, dA.sum(0), dB, dC, g_state


_LN2 = 0.6931471805599453


def _share(run: Callable[[int, int], int], tasks: int) -> list[int]:
    """Call ``run(first, end)`` on equal shares of the tasks, on as many threads as PyTorch itself would use."""
    threads = min(tasks, torch.get_num_threads())
    if threads == 1:
        return [run(0, tasks)]
    cuts = [tasks * i // threads for i in range(threads + 1)]
    # ctypes lets go of the interpreter lock while the kernel runs
    return list(_pool(os.getpid(), threads).map(run, cuts[:-1], cuts[1:]))


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # threads do not survive a fork, so every process has a pool of its own
    return ThreadPoolExecutor(threads, thread_name_prefix="vitkit-scan")
