"""Rounding that minimises the loss of the model: errors are made up for along inputs *and* outputs.

``min tr(G E H E^T)`` with ``E = W - Q``, H the second moment of the input and G that of the loss gradient at the output: the
Kronecker-factored second-order estimate of KL(dense || quantized). GPTQ is the case ``G = I``, where rows do not know of
each other. In full, what the rounding of one weight does is made up for by all later ones, in its row and below it
(YAQA, Tseng et al. 2025, arXiv 2505.22988): with the inverse's upper Cholesky factors U of G and V of H, the error of the
entries that are done changes those that are free through ``U (x) V``.

Here rows go in blocks, those of large ``G_ii`` first: inside a block GPTQ runs over the columns, then the rows below take
``U_b,below^T U_bb^-T E_b``. With blocks of one row this is the whole of it, with one block it is GPTQ; a block takes as many
steps as a row does, and two dozen of them leave little to gain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.products import subtract_product
from checkpoint.forms import Grid
from compress.parallel import FEW, each
from compress.quantizers.gptq import Columns, Levels, inverse_root
from compress.quantizers.grid import Quantized, find_scales

ROWS, BLOCKS = 64, 24  # rows of a block, or more of a tall weight: no more blocks than these
# weights that are rounded at a time, on several grids: 64 MB; of a larger weight as many grids as there are threads
TOGETHER = 1 << 24
# of G's mean diagonal: a gradient's moment is estimated from fewer effective tokens than an input's
OUTPUT_DAMPING = 0.1


def two_sided_rounding(
    weight: torch.Tensor,
    grids: Sequence[Grid],
    inputs: torch.Tensor | None,
    outputs: torch.Tensor | None,
    damping: float,
    dtype: torch.dtype,
) -> list[Quantized]:
    """``weight`` ``(d_out, d_in)`` on each grid, ``inputs`` is H ``(d_in, d_in)`` and ``outputs`` G ``(d_out, d_out)``; ``damping`` is H's.

    Raises ValueError if one is missing, torch.linalg.LinAlgError if a damped one is not positive definite.
    """
    if inputs is None or outputs is None:
        raise ValueError("the second moments of the input and of the output's gradient are needed")
    columns = Columns(inputs, damping)
    order = outputs.diagonal().argsort(descending=True, stable=True)
    upper = inverse_root(outputs, OUTPUT_DAMPING, order)
    found: list[Quantized] = []
    few, in_order = weight.numel() <= FEW, weight.float()[order]
    together = grids_together(weight.numel())
    for first in range(0, len(grids), together):
        some = grids[first : first + together]
        on = each(lambda grid: Levels(grid, *find_scales(weight, grid, inputs.diagonal(), dtype)), some, weight.numel())
        ordered = [levels.of(order) for levels in on]
        # on a thread of its own, so few numbers at a time being slower on several; of a large weight each grid on one
        shares = [ordered] if few else [[levels] for levels in ordered]
        codes = each(lambda share: _round(in_order, share, columns, upper), shares, ROWS)
        for levels, rounded in zip(on, (item for share in codes for item in share), strict=True):
            placed = torch.empty_like(rounded)
            placed[order] = rounded
            found.append(levels.quantized(placed))
    return found


def grids_together(numbers: int) -> int:
    """On how many grids a weight of so many numbers is rounded at a time."""
    return max(TOGETHER // numbers, torch.get_num_threads() if numbers > FEW else 1)


def rows_together(d_out: int) -> int:
    """Rows of a block of a weight of so many: ``ROWS``, or a multiple."""
    return ROWS * -(-d_out // (ROWS * BLOCKS))


def _round(weight: torch.Tensor, on: Sequence[Levels], columns: Columns, upper: torch.Tensor) -> list[torch.Tensor]:
    """Codes int8 of ``weight`` float32 ``(d_out, d_in)`` on each of the levels, rows in the order in which they are rounded."""
    rest = [weight.clone() for _ in on]
    codes = [weight.new_empty(weight.shape, dtype=torch.int8) for _ in on]
    rows = rows_together(len(weight))
    for start in range(0, len(weight), rows):
        stop = min(start + rows, len(weight))
        here = [levels.of(slice(start, stop)) for levels in on]
        rounded = columns.round([item[start:stop] for item in rest], here)
        for item, levels, done, whole in zip(rest, here, rounded, codes, strict=True):
            whole[start:stop] = done
            error = item[start:stop] - levels.quantized(done).dense()
            passed = torch.linalg.solve_triangular(upper[start:stop, start:stop].T, error, upper=False)
            subtract_product(item[stop:], upper[start:stop, stop:].T, passed)
    return codes
