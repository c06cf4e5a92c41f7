"""Tells glibc's heap to keep what is freed."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> None:
    """Keep freed memory in the process, so that a step on a CPU does not ask the system for the same pages again.

    By default glibc maps and unmaps large tensors one by one: a quarter of the time of a small model's step. Without glibc
    this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
