"""Gives freed memory back to the operating system between layers."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """glibc's malloc_trim, or None on other C libraries."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_memory() -> None:
    """Return free heap pages to the system.

    glibc keeps large freed blocks in its heap, and small ones between them hold it open: without this the
    resident memory of a sweep creeps up with the number of layers. It takes a few milliseconds.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
