"""Round to nearest: every weight to the nearest level of its group's grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from checkpoint.forms import Grid
from compress.quantizers.grid import Quantized, find_scales, round_to


def round_to_nearest(
    weight: torch.Tensor,
    grids: Sequence[Grid],
    inputs: torch.Tensor | None,
    outputs: torch.Tensor | None,
    damping: float,
    dtype: torch.dtype,
) -> list[Quantized]:
    """``weight`` ``(d_out, d_in)`` on each grid.

    The diagonal of ``inputs`` ``(d_in, d_in)``, if given, weighs the errors in the scale search; ``outputs`` and ``damping`` are
    not used.
    """
    found = []
    for grid in grids:
        scale, zero = find_scales(weight, grid, None if inputs is None else inputs.diagonal(), dtype)
        grouped = weight.float().unflatten(1, (scale.shape[1], -1))
        found.append(Quantized(round_to(grouped, scale, zero, grid).flatten(1), scale, zero, grid))
    return found
