"""AWSVD, LoRAP's decomposition of attention (Li et al. 2024, arXiv 2404.09695, section 3.1): SVD of ``W diag(rms x)``."""

from __future__ import annotations

import torch

from calibration.moments import Moments
from compress.parts import Factors
from compress.truncation import damping_floor, truncate_by_channels


def awsvd(weight: torch.Tensor, moments: Moments, rank: int, damping: float) -> Factors:
    """Truncation of ``weight`` ``(d_out, d_in)`` weighted by the input channels' root mean square.

    The reference code gives a dead channel 1e-4; here ``damping`` times the mean power is added to every channel's.
    """
    if moments.mean_square is None:
        raise ValueError("awsvd needs the inputs' mean square")
    power = moments.mean_square.double()
    return truncate_by_channels(weight, (power + damping_floor(damping, float(power.mean()))).sqrt(), rank)
