"""Memory settings of processes that train small models step after step. For whoever owns the process."""

from __future__ import annotations

import ctypes
import gc
import sys

ALLOCATIONS = 50_000
"""Objects made, less those freed, between two collections; Python's own choice is 700 up to 3.13."""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed blocks instead of giving them back to the kernel; False where there is no glibc.

    Every step frees and asks for the same large blocks; each time the kernel hands them out it clears them page by
    page. To be called by whoever owns the process, before it computes; memory use does not shrink afterwards.
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
    """Keep Python's garbage collector from going through all that there is, time and again.

    Loaded modules are some hundred thousand objects and stay; leaving them out saves a tenth of a round of tiny
    clients. With thousands of clients the collector goes through their messages, a third of a round, and finds nothing.
    To be called after the imports by whoever owns the process.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(ALLOCATIONS)
