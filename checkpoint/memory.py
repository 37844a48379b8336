"""Gives freed memory back to the operating system between layers, and reads the high-water mark."""

from __future__ import annotations

import ctypes
import resource
import sys
from functools import cache
from pathlib import Path
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


def peak_bytes() -> int:
    """The largest resident memory that this process has had, in bytes.

    On Linux from /proc: getrusage there starts from the memory of the parent that started the process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
