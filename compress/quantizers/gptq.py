"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): column after column, the others make up for each one's rounding error.

``min |(W - Q) H^1/2|^2``: with column j rounded, the best change of the columns that are still free is
``-(w_j - q_j) / [F^-1]_jj [F^-1]_j,:``, F the moment of column j and the free ones. All these inverses are in the
upper Cholesky factor U of ``H^-1 = U^T U`` (section 3.3): the change is ``-(w_j - q_j) / U_jj U_j,j+1:``.

Columns of large ``H_jj`` go first (act-order), in groups as they lie in the weight, whose scales are found before
(static groups): no index of groups needs to be stored.
"""

from __future__ import annotations

import torch

from checkpoint.forms import Grid
from compress.quantizers.grid import Quantized, find_scales
from compress.truncation import damping_floor

BLOCK = 128  # columns whose changes to later columns are applied in one product


def gptq(
    weight: torch.Tensor, grid: Grid, second: torch.Tensor | None, damping: float, dtype: torch.dtype
) -> Quantized:
    """``weight`` ``(d_out, d_in)``; ``second`` is H, ``(d_in, d_in)``; ``damping`` times its mean diagonal is added to it.

    Raises ValueError if H is missing, torch.linalg.LinAlgError if the damped H is not positive definite.
    """
    if second is None:
        raise ValueError("the second moment of the input is needed")
    moment = second.double()
    scale, zero = find_scales(weight, grid, moment.diagonal(), dtype)
    order = moment.diagonal().argsort(descending=True, stable=True)
    upper = inverse_root(moment[order][:, order], damping).float()
    rest = weight.float()[:, order].T.contiguous()  # a row per column of the weight: what a step touches is contiguous
    step_of = torch.arange(weight.shape[1])[order] // (weight.shape[1] // scale.shape[1])
    steps = scale.float().T.contiguous()
    zeros = None if zero is None else zero.float().T.contiguous()
    codes = torch.empty(rest.shape, dtype=torch.int8)
    for start in range(0, rest.shape[0], BLOCK):
        block = slice(start, min(start + BLOCK, rest.shape[0]))
        errors = torch.empty(rest[block].shape)
        for j in range(block.start, block.stop):
            step = steps[step_of[j]]
            shift = None if zeros is None else zeros[step_of[j]]
            level = rest[j] / step
            level = (level if shift is None else level + shift).round_().clamp_(grid.lowest, grid.highest)
            codes[j] = level.to(torch.int8)
            value = (level if shift is None else level - shift) * step
            error = (rest[j] - value) / upper[j, j]
            rest[j + 1 : block.stop].addr_(upper[j, j + 1 : block.stop], error, alpha=-1.0)
            errors[j - start] = error
        rest[block.stop :].addmm_(upper[block, block.stop :].T, errors, alpha=-1.0)
    placed = torch.empty_like(codes)
    placed[order] = codes
    return Quantized(placed.T.contiguous(), scale, zero, grid)


def inverse_root(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor U of ``(H + floor)^-1 = U^T U``, ``(d, d)`` float64, without the inverse itself.

    With ``J`` reversing the order, ``J H J = L L^T`` gives ``H = R R^T`` with ``R = J L J`` upper triangular, and so
    ``H^-1 = R^-T R^-1``: U is ``R^-1``.
    """
    damped = moment.flip(0, 1)
    damped.diagonal().add_(damping_floor(damping, float(moment.diagonal().mean())))
    root = torch.linalg.cholesky(damped).flip(0, 1)
    return torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=True)
