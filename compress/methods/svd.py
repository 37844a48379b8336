"""Plain truncated SVD of the weight (Eckart and Young 1936): nothing is weighted, no text is needed."""

from __future__ import annotations

import torch

from calibration.moments import Moments
from calibration.products import product
from compress.parts import Factors
from compress.truncation import truncate_by_input, truncate_by_output


def svd(weight: torch.Tensor, moments: Moments, rank: int, damping: float) -> Factors:
    """Best rank-``rank`` approximation of ``weight`` ``(d_out, d_in)`` in the Frobenius norm."""
    d_out, d_in = weight.shape
    if d_out <= d_in:
        return truncate_by_output(weight, product(weight, weight.T), rank)
    return truncate_by_input(weight, torch.eye(d_in, dtype=weight.dtype, device=weight.device), rank)
