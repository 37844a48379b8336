"""What this machine does in a second: products, decompositions, disk. Measured in a few tens of seconds, each the best of some tries."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from calibration.products import eigenvectors, product

LARGEST, ANCHOR = 4200, 4096  # sides above the first are not decomposed: their seconds are the second's, scaled by n^3
WIDEST = 8192  # side of the matrix that is factorised, at most: wider ones take as long a FLOP
FILE, BLOCK = 512 << 20, 16 << 20  # bytes of the file that is written and read, and of what goes in or out at a time
TRIES, LEAST, MOST = 3, 0.1, 1.0  # of every measurement; seconds that it is to take, and after which it is not repeated
CHOLESKY = "cholesky"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float32, torch.float64)}
Shape = tuple[int, int, int]  # of a product: tokens, d_in, d_out


@dataclass(frozen=True)
class Machine:
    """Measured rates.

    ``flops``: FLOP/s of products by dtype, and of Cholesky factorisations in float64 (``CHOLESKY``); ``eigen`` and
    ``eigen_single``: seconds of a symmetric eigendecomposition by side, float64 and float32; ``reading`` and ``writing``:
    bytes/s of a file in sequence, past the page cache.
    """

    flops: Mapping[str, float]
    eigen: Mapping[int, float]
    eigen_single: Mapping[int, float]
    reading: float
    writing: float

    def eigen_seconds(self, side: int) -> float:
        """Of a float64 eigendecomposition; by n^3 above ``LARGEST`` (KeyError for a smaller side that was not measured)."""
        return self.eigen[ANCHOR] * (side / ANCHOR) ** 3 if side > LARGEST else self.eigen[side]


def measure(shapes: Iterable[Shape], sides: Iterable[int], directory: Path) -> Machine:
    """Measure products of the shapes (the fastest is the rate), eigendecompositions of the sides, and the disk of ``directory``."""
    wanted, every = sorted({ANCHOR if side > LARGEST else side for side in sides}), set(shapes)
    flops = {name: max(_product(shape, dtype) for shape in every) for name, dtype in DTYPES.items()}
    flops[CHOLESKY] = _cholesky(min(WIDEST, max(max(d_in, d_out) for _, d_in, d_out in every)))
    reading, writing = _disk(directory)
    return Machine(flops, _eigen(wanted, torch.float64), _eigen(wanted, torch.float32), reading, writing)


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of some tries: of one, where that takes long; of many, where they are short."""
    found: list[float] = []
    while sum(found) < MOST and (len(found) < TRIES or sum(found) < LEAST):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def _product(shape: Shape, dtype: torch.dtype) -> float:
    """FLOP/s of a linear on tokens."""
    tokens, d_in, d_out = shape
    x, weight = torch.ones(tokens, d_in, dtype=dtype), torch.ones(d_out, d_in, dtype=dtype)
    return 2.0 * tokens * d_in * d_out / _seconds(lambda: product(x, weight.T))


def _symmetric(side: int) -> torch.Tensor:
    """A positive definite matrix of random numbers, float64."""
    rows = torch.randn(side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    symmetric = rows + rows.T
    symmetric.diagonal().add_(4 * side**0.5)  # more than the largest eigenvalue of the rest, by the semicircle law
    return symmetric


def _cholesky(side: int) -> float:
    """FLOP/s of a factorisation."""
    symmetric = _symmetric(side)
    return side**3 / 3 / _seconds(lambda: torch.linalg.cholesky(symmetric))


def _eigen(sides: Iterable[int], dtype: torch.dtype) -> dict[int, float]:
    found = {}
    for side in sides:
        symmetric = _symmetric(side).to(dtype)
        found[side] = _seconds(lambda symmetric=symmetric: eigenvectors(symmetric))
    return found


def _disk(directory: Path) -> tuple[float, float]:
    """Bytes/s of reading and of writing a file in ``directory``, which is removed."""
    path, block = directory / "disk.bin", os.urandom(BLOCK)
    try:
        with path.open("wb") as file:
            started = time.perf_counter()
            for _ in range(FILE // BLOCK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            writing = FILE / (time.perf_counter() - started)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(BLOCK)
        with path.open("rb", buffering=0) as file:
            started = time.perf_counter()
            while file.readinto(buffer):
                pass
            reading = FILE / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)
    return reading, writing
