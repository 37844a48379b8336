"""Keeps freed memory from staying with the process, and reads the high-water mark."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

from checkpoint.errors import UserError

# glibc's mallopt: parameters, and what they are set to
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENAS = -1, -3, -8
LARGE_BLOCK, FREE_AT_THE_TOP = 16 << 20, 256 << 20


PROCESS_BYTES = 515_000_000  # Python, torch, transformers and the heap before any layer: measured


def check_allowed(needed: int) -> None:
    """Raise UserError if the system's limits for this process are below ``needed`` bytes."""
    for allowed, flag in _limits():
        if allowed < needed:
            raise UserError(
                f"{needed / 1e9:.2f} GB of memory are needed, and the system allows this process {allowed / 1e9:.2f} GB "
                f"(ulimit {flag}); raise that{', or plan for less with --memory-limit' if needed > PROCESS_BYTES else ''}"
            )


def _limits() -> list[tuple[int, str]]:
    """The system's limits for this process, in bytes, and the flags of ulimit that set them."""
    found = [(resource.getrlimit(resource.RLIMIT_AS)[0], "-v"), (resource.getrlimit(resource.RLIMIT_DATA)[0], "-d")]
    return [(allowed, flag) for allowed, flag in found if allowed != resource.RLIM_INFINITY]


def out_of_memory(problem: BaseException) -> bool:
    """Whether the system gave no more memory, to Python or to torch, here or on a GPU.

    oneDNN does not say why it has no kernel for a product; where there is a limit, it is that.
    """
    import torch  # loaded already where its errors come from; not before check_allowed, which is asked first

    if not isinstance(problem, RuntimeError):
        return isinstance(problem, MemoryError)
    told = str(problem)
    return (
        isinstance(problem, torch.OutOfMemoryError)
        or "allocate memory" in told
        or ("could not create a primitive" in told and bool(_limits()))
    )


@cache
def _of_glibc(name: str) -> Any:
    """A function of glibc's allocator, or None on other C libraries."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)


def keep_large_blocks_apart() -> None:
    """Let large blocks come from the system and go back to it, for the whole life of this process.

    glibc moves its own threshold up to 32 MB as blocks are freed, and then a wide layer's matrices lie in the heap, between
    small blocks that hold it open: a fifth of the peak. Smaller blocks than these would cost more time than they save memory.
    With a heap for every thread the peak rises from layer to layer: there is one for all.
    """
    option = _of_glibc("mallopt")
    if option is not None:
        option(MMAP_THRESHOLD, LARGE_BLOCK)
        option(TRIM_THRESHOLD, FREE_AT_THE_TOP)
        option(ARENAS, 1)


def release_memory() -> None:
    """Return free heap pages to the system.

    glibc keeps large freed blocks in its heap, and small ones between them hold it open: without this the
    resident memory of a sweep creeps up with the number of layers. It takes a few milliseconds.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def peak_bytes() -> int:
    """The largest resident memory that this process has had, in bytes; on Linux since ``restart_peak``, if that was possible.

    On Linux from /proc: getrusage there starts from the memory of the parent that started the process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_peak() -> None:
    """Let ``peak_bytes`` count from now on; without effect where the system cannot forget its high-water mark."""
    mark = Path("/proc/self/clear_refs")
    if os.access(mark, os.W_OK):
        mark.write_text("5", encoding="ascii")
