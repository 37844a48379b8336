"""Weighted truncation: the best rank-r ``W'`` for ``tr((W - W') R (W - W')^T)``.

Any root ``L L^T = R`` gives ``W' = [W L]_r L^-1``, so Cholesky (SVD-LLM), the symmetric root (QERA-exact)
and the output's principal components (LLM-ROM) are one optimum (METHODS 1.1). It is the projection
``W' = U_r U_r^T W`` with ``U`` the left singular vectors of ``W L``: nothing is inverted, a rank-deficient
``R`` does no harm, and full rank gives ``W`` back. Only the smaller side is decomposed, in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from calibration.products import eigenvectors, product
from checkpoint.finite import finite
from compress.counts import count
from compress.parts import Factors

# a Krylov space finds this part of the directions, or less, sooner than a full decomposition; and how exactly
FEW, TOLERANCE = 1 / 16, 1e-3
SPREAD = 1e-6  # of the kept eigenvalues, smallest to largest, above which the directions are orthonormal to 1e-10 once they are scaled
ROUNDING = 1e-10  # what is left of a vector, relative to the largest, when it adds nothing
SMALL = 1e-6  # an eigenvalue, relative to the largest, that products in float32 do not tell from nought


class NotFinite(ValueError):
    """A moment or a weight holds NaN or inf."""


def truncate_by_output(weight: torch.Tensor, second: torch.Tensor, rank: int) -> Factors:
    """Ordered factors from the output's second moment ``second = W R W^T``, for ``d_out <= d_in``.

    ``weight`` ``(d_out, d_in)`` and ``second`` ``(d_out, d_out)`` float64; keeps ``rank`` directions.
    """
    power, vectors = descending(second)
    u = vectors[:, :rank]
    return Factors(u, product(u.T, weight), tails(power, rank))


def truncate_by_input(weight: torch.Tensor, root: torch.Tensor, rank: int) -> Factors:
    """Ordered factors from a root ``root root^T = R`` of the input's moment, for ``d_in < d_out``.

    ``weight`` ``(d_out, d_in)`` and ``root`` ``(d_in, d_in)`` float64. The left singular vectors are the columns of
    ``W L V_r``, orthogonal already, over their lengths; where the least nearly vanish, a QR's, which stay orthonormal.
    """
    rooted = product(weight, root)
    power, vectors = descending(product(rooted.T, rooted))
    # of the whole product nothing more is needed, and it is as large as the weight
    rooted = product(rooted, vectors[:, :rank])
    kept = power[:rank]
    u = rooted.div_(kept.sqrt()) if bool((kept > SPREAD * power[0]).all()) else torch.linalg.qr(rooted).Q
    return Factors(u, product(u.T, weight), tails(power, rank))


def truncate(weight: torch.Tensor, second_of_input: torch.Tensor, rank: int) -> Factors:
    """Ordered factors for the input moment ``R`` ``(d_in, d_in)`` float64, by whichever side is smaller."""
    d_out, d_in = weight.shape
    if d_out <= d_in:
        return truncate_by_output(weight, product(product(weight, second_of_input), weight.T), rank)
    return truncate_by_input(weight, root_of(second_of_input), rank)


def truncate_by_channels(weight: torch.Tensor, scale: torch.Tensor, rank: int) -> Factors:
    """Ordered factors where each input channel counts by ``scale`` ``(d_in,)`` float64: the SVD of ``W diag(scale)``."""
    if weight.shape[0] <= weight.shape[1]:
        scaled = weight * scale
        return truncate_by_output(weight, product(scaled, scaled.T), rank)
    return truncate_by_input(weight, torch.diag(scale), rank)


def root_of(second: torch.Tensor) -> torch.Tensor:
    """A root ``L`` with ``L L^T = second``, ``(d, d)`` float64: Cholesky's, or, of a singular matrix, from its eigenvectors.

    Which one makes no difference to ``W'``.
    """
    root, failed = torch.linalg.cholesky_ex(second)
    return root if not failed and finite(root) else symmetric_root(second)


def symmetric_root(second: torch.Tensor) -> torch.Tensor:
    """A root ``L`` with ``L L^T = second``, ``(d, d)`` float64; rounding below zero counts as zero."""
    power, vectors = descending(second)
    return vectors * power.sqrt()


def damping_floor(damping: float, power: float) -> float:
    """What is added to a moment's diagonal of mean ``power``; 1 where the moment vanishes.

    For inputs that are zero throughout, any approximation is as good by the text; the limit of ever smaller
    damping is plain SVD, and that is what 1 gives.
    """
    if power > 0:
        count("moments damped", int(damping > 0))
        return damping * power
    count("moments of zero, one put in their diagonal")
    return 1.0


def descending(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (not negative) and eigenvectors of a float64 matrix, largest first; NotFinite if it holds NaN or inf.

    The lower triangle is what counts.
    """
    if not finite(symmetric):
        raise NotFinite("a second moment holds NaN or inf")
    values, vectors = eigenvectors(symmetric)
    return _not_negative(values.flip(0)), vectors.flip(1)


def _not_negative(values: torch.Tensor) -> torch.Tensor:
    count("eigenvalues below zero, by rounding, taken as zero", int((values < 0).sum()))
    return values.clamp(min=0)


def leading(apply: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, count: int) -> torch.Tensor:
    """The eigenvectors ``(d, count)`` of the ``count`` largest eigenvalues of a symmetric matrix that is known by its products.

    ``apply`` multiplies ``(d, n)`` float64 with the matrix, ``start`` ``(d, n)`` float64 are random vectors, some more than
    ``count``. A block Krylov method (Musco and Musco 2015, arXiv 1504.05477, algorithm 2): each block's product with the matrix,
    orthogonal to all before, is the next block, and the best vectors are those of the matrix on the space of all blocks. It ends when a
    block adds less than ``TOLERANCE`` to each of the ``count`` eigenvalues. Raises NotFinite for NaN or inf.
    """
    basis, images, found = start[:, :0], start[:, :0], start
    before = start.new_zeros(count)
    while True:
        found = _orthonormal(found, basis)
        images = torch.cat([images, apply(found)], dim=1)
        if not finite(images[:, basis.shape[1] :]):
            raise NotFinite("a second moment holds NaN or inf")
        basis = torch.cat([basis, found], dim=1)
        small = basis.T @ images
        values, turns = torch.linalg.eigh((small + small.T) / 2)
        found, largest = images[:, -found.shape[1] :], values[-count:]
        risen = largest > before * (1 + TOLERANCE) + SMALL * largest.abs().max()
        if not bool(risen.any()) or basis.shape[1] == len(basis):
            return basis @ turns[:, -count:].flip(1)
        before = largest


def _orthonormal(vectors: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of what ``vectors`` add to the space of ``basis``; twice, because the first remainder may be mostly rounding."""
    size = float(torch.linalg.matrix_norm(vectors))
    for _ in range(2):
        left, strengths, _ = torch.linalg.svd(vectors - basis @ (basis.T @ vectors), full_matrices=False)
        vectors, size = left[:, strengths > ROUNDING * size], 1.0
    return vectors


def tails(power: torch.Tensor, rank: int) -> torch.Tensor:
    """``tails[r] = sum of power[r:]`` for r = 0 ... rank, summed from the small end."""
    tails = torch.cat([power.flip(0).cumsum(0).flip(0), power.new_zeros(1)])
    return tails[: min(rank, power.numel()) + 1]
