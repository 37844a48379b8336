"""ASVD (Yuan et al. 2023, arXiv 2312.05821, equation 6): SVD of ``W diag(s)`` with ``s_j = (mean |x_j|)^0.5``."""

from __future__ import annotations

import torch

from calibration.moments import Moments
from compress.parts import Factors
from compress.truncation import damping_floor, truncate_by_channels

ALPHA = 0.5


def asvd(weight: torch.Tensor, moments: Moments, rank: int, damping: float) -> Factors:
    """Truncation of ``weight`` ``(d_out, d_in)`` weighted by the input channels' mean magnitude.

    Exact where the paper's code uses a randomised SVD. ``damping`` keeps a dead channel's scale above zero.
    """
    if moments.mean_absolute is None:
        raise ValueError("asvd needs the inputs' mean magnitude")
    magnitude = moments.mean_absolute.double()
    scale = (magnitude + damping_floor(damping, float(magnitude.mean()))) ** ALPHA
    return truncate_by_channels(weight, scale, rank)
