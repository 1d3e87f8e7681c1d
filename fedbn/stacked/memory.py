"""Process-wide memory settings for training many small models; to be called by the main program."""

from __future__ import annotations

import ctypes
import gc
import sys

GC_THRESHOLD = 50_000
"""Net number of allocated objects that triggers a garbage collection; Python's default is 700 up to 3.13."""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Make glibc reuse freed blocks instead of returning them to the kernel; False without glibc.

    Every step frees and allocates the same large blocks, and the kernel clears each block page by page. Call this once
    in the main program, before any computation; memory use does not shrink afterwards.
    ``mallopt`` (3), https://man7.org/linux/man-pages/man3/mallopt.3.html

    >>> keep_freed_memory() == sys.platform.startswith("linux")
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    options = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20}
    return all(libc.mallopt(option, value) == 1 for option, value in options.items())


def collect_garbage_rarely() -> None:
    """Freeze the loaded modules and make garbage collections rare.

    Loaded modules are about a hundred thousand permanent objects; excluding them saves a tenth of a round of tiny
    clients. With thousands of clients the collector spends a third of a round on their messages and frees nothing.
    Call this once in the main program, after the imports.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
