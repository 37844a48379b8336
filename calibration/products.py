"""Products and eigenvectors in float32 and float64, by the library that is faster on this processor.

That is torch's, but for AMD's processors with AVX-512: torch's MKL keeps to AVX2 there, numpy's OpenBLAS does not
(checkpoint/environment.py).
On Zen 5 its products take half the time in float32, five eighths in float64, and less where a matrix meets its own transpose,
of which it makes one triangle.
"""

from __future__ import annotations

import numpy as np
import torch

from checkpoint.environment import OPENBLAS_IS_WIDER

DTYPES = (torch.float32, torch.float64)
PIECE = 1 << 22  # numbers of a product that is to be subtracted


def by_numpy(matrix: torch.Tensor) -> bool:
    """Whether OpenBLAS multiplies and decomposes it."""
    return OPENBLAS_IS_WIDER and matrix.device.type == "cpu" and matrix.dtype in DTYPES


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b``, new; ``(m, k)`` and ``(k, n)`` of one dtype (bfloat16 is torch's), without gradients."""
    if by_numpy(a):
        return torch.from_numpy(a.numpy() @ b.numpy())
    return a @ b


def subtract_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total -= a @ b``, in place; ``total`` ``(m, n)``, ``a`` ``(m, k)`` and ``b`` ``(k, n)`` of one dtype, without gradients."""
    if not by_numpy(a):
        total.addmm_(a, b, alpha=-1.0)
        return
    step = max(1, PIECE // max(1, total.shape[1]))  # numpy has no product that adds: some rows' is there besides
    for first in range(0, len(total), step):
        total[first : first + step] -= product(a[first : first + step], b)


def eigenvectors(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues ``(n,)``, rising, and eigenvectors ``(n, n)``, columns, of a finite matrix; its lower triangle is what counts.

    Raises torch.linalg.LinAlgError where they are not found.
    """
    if not by_numpy(symmetric):
        values, vectors = torch.linalg.eigh(symmetric)
        return values, vectors
    try:
        found = np.linalg.eigh(symmetric.numpy(), UPLO="L")
    except np.linalg.LinAlgError as problem:
        raise torch.linalg.LinAlgError(str(problem)) from problem
    return torch.from_numpy(found.eigenvalues), torch.from_numpy(found.eigenvectors)
