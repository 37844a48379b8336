"""Atomic feature mimicking, as LORD uses it: principal components of the centred output features, and a bias.

``Sigma = E[y y^T] - m m^T`` with ``m = E[y]``; ``W' = U_r U_r^T W`` with its leading eigenvectors, and ``b' = b + (I - U_r U_r^T) m``
(Yu and Wu, AAAI 2023; LORD: Kaushal et al. 2023, arXiv 2309.14021). The optimum of ``E|y - y'|^2`` where a bias may be
changed; without the bias it would be worse than not centring (METHODS 1.2).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from calibration.moments import Moments
from compress.methods.whitened import whitened
from compress.parts import Factors


def afm(weight: torch.Tensor, moments: Moments, rank: int, damping: float) -> Factors:
    """Best rank-``rank`` ``W'`` with a free bias; ``weight`` ``(d_out, d_in)`` float64. The factors carry the means."""
    if moments.mean is None:
        raise ValueError("the inputs' mean is needed")
    mean = moments.mean.double()
    mean_output = weight @ mean
    if moments.input is not None:
        centred = replace(moments, input=moments.input.double() - torch.outer(mean, mean))
    else:
        centred = replace(moments, output=moments.of_output(weight) - torch.outer(mean_output, mean_output))
    found = whitened(weight, centred, rank, damping)
    return replace(found, mean_input=mean, mean_output=mean_output)
