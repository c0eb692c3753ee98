"""Keep OpenVINO from leaving a thread with a stack for signals that is gone."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    # stack_t as Linux has it
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Put this thread's alternate signal stack back after a block that makes OpenVINO's ``Core``.

    Each core installs a stack of its own and, when it is deleted, the one it found. Two of them deleted in the order
    they were made leave memory that was given back, and the next signal with a handler (a child process that ends
    while a DataLoader has workers) kills the process. Found with OpenVINO 2026.4. Does nothing outside Linux.
    """
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None)
    before = _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
