"""Rounding that minimises the loss of the model: errors are made up for along inputs *and* outputs.

``min tr(G E H E^T)`` with ``E = W - Q``, H the second moment of the input and G that of the loss gradient at the output: the
Kronecker-factored second-order estimate of KL(dense || quantized). GPTQ is the case ``G = I``, where rows do not know of
each other. In full, what the rounding of one weight does is made up for by all later ones, in its row and below it
(YAQA, Tseng et al. 2025, arXiv 2505.22988): with the inverse's upper Cholesky factors U of G and V of H, the error of the
entries that are done changes those that are free through ``U (x) V``.

Here rows go in blocks, those of large ``G_ii`` first: inside a block GPTQ runs over the columns, then the rows below take
``U_b,below^T U_bb^-T E_b``. With blocks of one row this is the whole of it, with one block it is GPTQ; blocks of 64 rows lose a
few per cent and cost sixty-four times less.
"""

from __future__ import annotations

import torch

from checkpoint.forms import Grid
from compress.quantizers.gptq import Columns, inverse_root
from compress.quantizers.grid import Quantized, find_scales

ROWS = 64
OUTPUT_DAMPING = (
    0.1  # of G's mean diagonal: a gradient's moment is estimated from fewer effective tokens than an input's
)


def two_sided_rounding(
    weight: torch.Tensor,
    grid: Grid,
    inputs: torch.Tensor | None,
    outputs: torch.Tensor | None,
    damping: float,
    dtype: torch.dtype,
) -> Quantized:
    """``weight`` ``(d_out, d_in)``, ``inputs`` is H ``(d_in, d_in)`` and ``outputs`` G ``(d_out, d_out)``; ``damping`` is H's.

    Raises ValueError if one is missing, torch.linalg.LinAlgError if a damped one is not positive definite.
    """
    if inputs is None or outputs is None:
        raise ValueError("the second moments of the input and of the output's gradient are needed")
    scale, zero = find_scales(weight, grid, inputs.diagonal(), dtype)
    columns = Columns(inputs, damping)
    moment = outputs.double()
    order = moment.diagonal().argsort(descending=True, stable=True)
    upper = inverse_root(moment[order][:, order], OUTPUT_DAMPING).float()
    rest = weight.float()[order]
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        stop = start + len(rows)
        shift = None if zero is None else zero[rows]
        codes[rows] = columns.round(rest[start:stop], scale[rows], shift, grid)
        error = rest[start:stop] - Quantized(codes[rows], scale[rows], shift, grid).dense()
        passed = torch.linalg.solve_triangular(upper[start:stop, start:stop].T, error, upper=False)
        rest[stop:].addmm_(upper[start:stop, stop:].T, passed, alpha=-1.0)
    return Quantized(codes, scale, zero, grid)
