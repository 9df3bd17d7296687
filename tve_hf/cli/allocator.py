"""Memory for a program that needs the same again and again."""

import ctypes
import os

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next batch, where it would give it back and have it zeroed anew each time.

    On a CPU that takes as long as much of what is computed. Elsewhere, and where the user has set it, nothing changes.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
