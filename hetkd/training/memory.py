"""Main memory in training on a CPU: what a step frees stays there for the next one."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024  # that glibc comes to by itself, when large blocks are freed
_USUAL_MMAP_MAX = 65536


@contextmanager
def freed_memory_kept(*, enabled: bool = True) -> Iterator[bool]:
    """Makes glibc's allocator keep what is freed, so that no step fetches its memory from the system again.

    By default it gives large blocks back as they are freed, and a step of training pays for tens of thousands of page
    faults, more or fewer as blocks happen to lie (docs/performance.md). At the end free memory goes back to the system.

    Args:
        enabled: False changes nothing.

    Yields:
        Whether it is kept: not without glibc, nor where the environment (``MALLOC_...``, ``GLIBC_TUNABLES``) says
        how memory is to be handled.
    """
    libc = _glibc() if enabled and not _set_by_environment() else None
    if libc is None:
        yield False
        return
    kept = bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, -1))
    try:
        yield kept
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_MMAP_MAX, _USUAL_MMAP_MAX)
        libc.malloc_trim(0)


def _glibc() -> Any:
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except (OSError, TypeError):  # as on Windows
        return None


def _set_by_environment() -> bool:
    return any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
