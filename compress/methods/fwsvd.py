"""FWSVD (Hsu et al. 2022, arXiv 2207.00112, equation 7): rows weighted by their Fisher information.

``W' = D^-1 [D W]_r`` with ``D = diag(F)^1/2`` and ``F_i = sum_j E[(dL/dW_ij)^2]``. Of one token ``dL/dW_ij = g_i x_j``, so that
``F_i = E[g_i^2 |x|^2]``; the paper's gradients are those of a batch, which adds the tokens' cross terms.
"""

from __future__ import annotations

import torch

from calibration.moments import Moments
from calibration.products import product
from compress.parts import Factors
from compress.truncation import damping_floor, descending, tails, truncate_by_output


def fwsvd(weight: torch.Tensor, moments: Moments, rank: int, damping: float) -> Factors:
    """Truncation of ``weight`` ``(d_out, d_in)`` with each row's error counted by its Fisher information.

    ``damping`` times the mean is added to every row's.
    """
    if moments.row_fisher is None:
        raise ValueError("fwsvd needs the rows' Fisher information")
    fisher = moments.row_fisher.double()
    root = (fisher + damping_floor(damping, float(fisher.mean()))).sqrt()
    scaled = weight * root[:, None]
    if weight.shape[0] <= weight.shape[1]:
        found = truncate_by_output(scaled, product(scaled, scaled.T), rank)
        return Factors(found.a / root[:, None], found.b, found.loss)
    power, vectors = descending(product(scaled.T, scaled))
    kept = vectors[:, :rank]
    return Factors(product(weight, kept), kept.T, tails(power, rank))
