"""What the C library does with freed memory, which decides how fast operations on large tensors are."""

from __future__ import annotations

import ctypes
import platform


def keep_freed_memory() -> bool:
    """Freed memory stays with this process from now on; True where that could be had (glibc).

    Returned to the system, it is cleared page by page for whoever takes it next, which may cost more than the
    arithmetic and hits the one of two sides that happens to allocate.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    # from malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    settings = ((-4, 0), (-1, 2**31 - 1), (-2, 2**26))
    return all(ctypes.CDLL(None).mallopt(setting, value) for setting, value in settings)
