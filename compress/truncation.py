"""Weighted truncation: the best rank-r ``W'`` for ``tr((W - W') R (W - W')^T)``.

Any root ``L L^T = R`` gives ``W' = [W L]_r L^-1``, so Cholesky (SVD-LLM), the symmetric root (QERA-exact)
and the output's principal components (LLM-ROM) are one optimum (METHODS 1.1). It is the projection
``W' = U_r U_r^T W`` with ``U`` the left singular vectors of ``W L``: nothing is inverted, a rank-deficient
``R`` does no harm, and full rank gives ``W`` back. Only the smaller side is decomposed, in float64.
"""

from __future__ import annotations

import numpy
import torch
from scipy.sparse.linalg import eigsh

from compress.counts import count
from compress.parts import Factors

# a Krylov space finds this part of the directions, or less, sooner than a full decomposition; and how exactly
FEW, TOLERANCE = 1 / 16, 1e-4


class NotFinite(ValueError):
    """A moment or a weight holds NaN or inf."""


def truncate_by_output(weight: torch.Tensor, second: torch.Tensor, rank: int) -> Factors:
    """Ordered factors from the output's second moment ``second = W R W^T``, for ``d_out <= d_in``.

    ``weight`` ``(d_out, d_in)`` and ``second`` ``(d_out, d_out)`` float64; keeps ``rank`` directions.
    """
    power, vectors = descending(second)
    u = vectors[:, :rank]
    return Factors(u, u.T @ weight, tails(power, rank))


def truncate_by_input(weight: torch.Tensor, root: torch.Tensor, rank: int) -> Factors:
    """Ordered factors from a root ``root root^T = R`` of the input's moment, for ``d_in < d_out``.

    ``weight`` ``(d_out, d_in)`` and ``root`` ``(d_in, d_in)`` float64. The left singular vectors come from a
    QR of ``W L V_r``, whose columns are orthogonal already: it stays orthonormal where they vanish.
    """
    rooted = weight @ root
    power, vectors = descending(rooted.T @ rooted)
    u, _ = torch.linalg.qr(rooted @ vectors[:, :rank])
    return Factors(u, u.T @ weight, tails(power, rank))


def truncate(weight: torch.Tensor, second_of_input: torch.Tensor, rank: int) -> Factors:
    """Ordered factors for the input moment ``R`` ``(d_in, d_in)`` float64, by whichever side is smaller."""
    d_out, d_in = weight.shape
    if d_out <= d_in:
        return truncate_by_output(weight, weight @ second_of_input @ weight.T, rank)
    return truncate_by_input(weight, root_of(second_of_input), rank)


def truncate_by_channels(weight: torch.Tensor, scale: torch.Tensor, rank: int) -> Factors:
    """Ordered factors where each input channel counts by ``scale`` ``(d_in,)`` float64: the SVD of ``W diag(scale)``."""
    if weight.shape[0] <= weight.shape[1]:
        scaled = weight * scale
        return truncate_by_output(weight, scaled @ scaled.T, rank)
    return truncate_by_input(weight, torch.diag(scale), rank)


def root_of(second: torch.Tensor) -> torch.Tensor:
    """A root ``L`` with ``L L^T = second``, ``(d, d)`` float64: Cholesky's, or, of a singular matrix, from its eigenvectors.

    Which one makes no difference to ``W'``.
    """
    root, failed = torch.linalg.cholesky_ex((second + second.T) / 2)
    return root if not failed and bool(torch.isfinite(root).all()) else symmetric_root(second)


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
    """Eigenvalues (not negative) and eigenvectors of a float64 matrix, largest first; NotFinite if it holds NaN or inf."""
    if not bool(torch.isfinite(symmetric).all()):
        raise NotFinite("a second moment holds NaN or inf")
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    return _not_negative(values.flip(0)), vectors.flip(1)


def _not_negative(values: torch.Tensor) -> torch.Tensor:
    count("eigenvalues below zero, by rounding, taken as zero", int((values < 0).sum()))
    return values.clamp(min=0)


def leading(symmetric: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest eigenvalues and their vectors ``(d, count)``, and behind the values the sum of all others.

    Float64; NotFinite if the matrix holds NaN or inf. A few of many come from a Lanczos method (ARPACK): the vectors are orthonormal
    to rounding and the values within ``TOLERANCE``, so what is left of a nearly flat spectrum is larger than the
    optimum by no more than that. It has no like on other devices, which find all of them as fast.
    """
    if count > len(symmetric) * FEW or symmetric.device.type != "cpu":
        power, vectors = descending(symmetric)
        return torch.cat([power[:count], power[count:].sum().unsqueeze(0)]), vectors[:, :count]
    if not bool(torch.isfinite(symmetric).all()):
        raise NotFinite("a second moment holds NaN or inf")
    power, vectors = symmetric.new_empty(0), symmetric.new_empty(len(symmetric), 0)
    if count:
        start = numpy.random.default_rng(0).standard_normal(len(symmetric))  # ARPACK's own would differ from run to run
        values, found = eigsh(((symmetric + symmetric.T) / 2).numpy(), k=count, which="LA", tol=TOLERANCE, v0=start)
        order = numpy.argsort(-values, kind="stable")
        power, vectors = _not_negative(torch.from_numpy(values[order])), torch.from_numpy(found[:, order])
    rest = (symmetric.trace() - power.sum()).clamp(min=0)
    return torch.cat([power, rest.unsqueeze(0)]), vectors


def tails(power: torch.Tensor, rank: int) -> torch.Tensor:
    """``tails[r] = sum of power[r:]`` for r = 0 ... rank, summed from the small end."""
    tails = torch.cat([power.flip(0).cumsum(0).flip(0), power.new_zeros(1)])
    return tails[: min(rank, power.numel()) + 1]
