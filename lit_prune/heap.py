"""The C library's heap: glibc keeps memory that is let go, in pieces that what comes next need not fit into."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

GIVEN_BACK = 2**25
"""Bytes from which on glibc always gives memory back at once that is freed; of less it keeps the pieces."""

_GLIBC = ctypes.CDLL(None) if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim") else None
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def give_back() -> None:
    """Let the system have what is free."""
    if _GLIBC:
        _GLIBC.malloc_trim(0)


@contextmanager
def without_holes() -> Iterator[None]:
    """Inside the context, pieces of 4 MiB or more go back to the system as soon as they are let go.

    By itself glibc does so from a size on that rises with what is freed, up to `GIVEN_BACK`. Memory that is new to a
    process has to be cleared and mapped, so that passes through blocks take longer. Contexts are not nested: behind
    each one the size is `GIVEN_BACK`.
    """
    if not _GLIBC:
        yield
        return
    _GLIBC.mallopt(_M_MMAP_THRESHOLD, 2**22)
    try:
        yield
    finally:
        _GLIBC.mallopt(_M_MMAP_THRESHOLD, GIVEN_BACK)
        _GLIBC.mallopt(_M_TRIM_THRESHOLD, 2 * GIVEN_BACK)  # as it would be by itself, too
