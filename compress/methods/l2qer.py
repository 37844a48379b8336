"""L2QER's scaling (Zhang et al. 2024, arXiv 2402.02446, section 3.2): each input channel counts by its mean magnitude."""

from __future__ import annotations

import torch

from calibration.moments import Moments
from compress.counts import count
from compress.parts import Factors
from compress.truncation import truncate_by_channels

FLOOR = 1e-4


def l2qer(weight: torch.Tensor, moments: Moments, rank: int, damping: float) -> Factors:
    """Ordered factors of ``weight`` ``(d_out, d_in)`` float64 from the SVD of ``W diag(E|x|)``.

    The paper takes the largest of the batches' means, which depends on how the text is cut into batches; here it is the mean
    over all tokens. ``damping`` is not used; channels that are always zero count by 1e-4, as in the paper. Raises
    ValueError if the moment is missing.
    """
    if moments.mean_absolute is None:
        raise ValueError("the mean magnitudes of the input channels are needed")
    magnitude = moments.mean_absolute.double()
    count("channels below the floor", int((magnitude < FLOOR).sum()))
    return truncate_by_channels(weight, magnitude.clamp(min=FLOOR), rank)
