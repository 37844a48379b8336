"""Whether numbers are numbers."""

from __future__ import annotations

import math

import torch


def finite(tensor: torch.Tensor) -> bool:
    """Whether no number of ``tensor`` is NaN or inf: either shows in the smallest or the largest, which take one look at each."""
    return not tensor.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(tensor))
