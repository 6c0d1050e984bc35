"""Main memory in training on a CPU: what a step frees stays there for the next one."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024  # that glibc comes to by itself, as large blocks are freed
_USUAL_MMAP_MAX = 65536
_lock = threading.Lock()
_keeping = 0  # how many contexts


@contextmanager
def freed_memory_kept(*, enabled: bool = True) -> Iterator[bool]:
    """Makes glibc's allocator keep what is freed, so that no step fetches its memory from the system again.

    By default it gives large blocks back as they are freed, and a step of training pays for tens of thousands of page
    faults, more or fewer as blocks happen to lie (docs/performance.md). It is a setting of the whole process. After the
    last context the allocator is as it would have come to be by itself, its thresholds at their largest, and
    free memory goes back to the system. Blocks over 64 MB that threads other than the main one free are not kept.

    Args:
        enabled: False changes nothing.

    Yields:
        Whether glibc was told so: not where there is none, nor where the environment sets these thresholds. (An
        allocator that is loaded instead of glibc's goes on as before.)
    """
    global _keeping
    libc = _glibc() if enabled and not _set_by_environment() else None
    if libc is None:
        yield False
        return
    with _lock:
        _keeping += 1
    try:
        yield bool(libc.mallopt(_MMAP_MAX, 0)) and bool(libc.mallopt(_TRIM_THRESHOLD, -1))
    finally:
        with _lock:
            _keeping -= 1
            if not _keeping:
                libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
                libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
                libc.mallopt(_MMAP_MAX, _USUAL_MMAP_MAX)
        libc.malloc_trim(0)


def give_back_freed_memory() -> None:
    """Gives back what was kept so far: before processes start that would hold a copy, and so that no gaps add up."""
    libc = _glibc() if _keeping else None
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # as on Windows
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _set_by_environment() -> bool:
    thresholds = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(f"MALLOC_{name.upper()}_" in os.environ or f"malloc.{name}" in tunables for name in thresholds)
