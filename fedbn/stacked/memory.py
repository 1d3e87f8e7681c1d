"""Memory settings of processes that train small models step after step. For whoever owns the process."""

from __future__ import annotations

import ctypes
import gc
import sys

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


def leave_alone_what_is_loaded() -> None:
    """Keep Python's garbage collector from going through all that there is now, time and again.

    Loaded modules are some hundred thousand objects and stay. Every message makes new ones, so that the collector
    soon looks at everything: a tenth of a round of tiny clients. To be called after the imports.
    """
    gc.collect()
    gc.freeze()
