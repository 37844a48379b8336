"""A product of two factors without its redundancy: Pivoting Factorization (Zhao et al., ICML 2025, arXiv 2501.19090).

``a b = (a Q) (Q^-1 b)`` for any invertible ``Q (r, r)``: r^2 of a product's ``r (d_out + d_in)`` numbers say nothing. With ``Q``
the inverse of r linearly independent rows of ``a``, those rows of ``a Q`` are the identity and are not stored. The paper finds
the rows by QR with column pivoting; here by LU with partial pivoting, then by exchanges until no coefficient exceeds 2
(Knuth 1985, "Semi-optimal bases for linear dependencies"): each exchange multiplies the pivots' volume by that coefficient,
so it ends. Small coefficients are what keeps half-precision rounding small.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from calibration.products import product
from checkpoint.forms import Part
from compress.parts import LowRank, Pivoted

LARGEST_COEFFICIENT = 2.0


def pivoted(part: LowRank) -> Pivoted:
    """The same product (computed in float64) in the pivoted form, in the part's dtype."""
    a = part.a.double()
    rows, coefficients = dominant_rows(a)
    kept = product(a[rows[: part.rank]], part.b.double())
    order = torch.empty_like(rows)
    order[rows] = torch.arange(rows.numel(), device=rows.device)
    dtype = part.a.dtype
    return Pivoted(kept.to(dtype), coefficients.to(dtype), order.to(torch.int32), part.shift)


def dominant_rows(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A permutation ``p`` of the rows of ``a (m, r)`` float64, and ``c (m - r, r)`` with ``a[p[r:]] = c a[p[:r]]``.

    No entry of ``c`` exceeds ``LARGEST_COEFFICIENT`` in size. ``m >= r``; columns that depend on one another are allowed.
    """
    rank = a.shape[1]
    factors, exchanges, _ = torch.linalg.lu_factor_ex(a)
    rows = list(range(a.shape[0]))
    for i, j in enumerate((exchanges - 1).tolist()):
        rows[i], rows[j] = rows[j], rows[i]
    c = torch.linalg.solve_triangular(factors[:rank], factors[rank:], upper=False, left=False, unitriangular=True)
    while c.numel() and float(c.abs().max()) > LARGEST_COEFFICIENT:
        i, j = divmod(int(c.abs().argmax()), rank)
        rows[j], rows[rank + i] = rows[rank + i], rows[j]
        pivot, column, row = c[i, j].clone(), c[:, j].clone(), c[i].clone()
        row[j] -= 1
        c -= torch.outer(column / pivot, row)
        # the row that was a pivot, in terms of the new pivots
        c[i] = -row / pivot
        c[i, j] = 1 / pivot
    return torch.tensor(rows, device=a.device), c


# how the chosen rank of ordered factors becomes what is stored, by form (checkpoint/forms.py has their tensors)
PART_FORMS: dict[str, Callable[[LowRank], Part]] = {"factors": lambda part: part, "pivoted": pivoted}
