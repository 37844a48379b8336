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
    weight: torch.Tensor,
    grid: Grid,
    inputs: torch.Tensor | None,
    outputs: torch.Tensor | None,
    damping: float,
    dtype: torch.dtype,
) -> Quantized:
    """``weight`` ``(d_out, d_in)``; ``inputs`` is H, ``(d_in, d_in)``; ``damping`` times its mean diagonal is added to it.

    ``outputs`` is not used. Raises ValueError if H is missing, torch.linalg.LinAlgError if the damped H is not positive definite.
    """
    if inputs is None:
        raise ValueError("the second moment of the input is needed")
    scale, zero = find_scales(weight, grid, inputs.diagonal(), dtype)
    columns = Columns(inputs, damping)
    return Quantized(columns.round(weight.float(), scale, zero, grid), scale, zero, grid)


class Columns:
    """The order in which the columns of a weight are rounded, and how the rest make up for each; for many weights alike."""

    def __init__(self, inputs: torch.Tensor, damping: float) -> None:
        moment = inputs.double()
        self._order = moment.diagonal().argsort(descending=True, stable=True)
        self._upper = inverse_root(moment[self._order][:, self._order], damping).float()

    def round(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> torch.Tensor:
        """Codes int8 ``(d_out, d_in)`` of ``weight`` float32 on the grid that ``scale`` and ``zero`` ``(d_out, groups)`` make."""
        order, upper = self._order, self._upper
        # a row per column of the weight: what a step touches is contiguous
        rest = weight[:, order].T.contiguous()
        step_of = (order // (weight.shape[1] // scale.shape[1])).tolist()
        steps = scale.float().T.contiguous()
        zeros = torch.zeros_like(steps) if zero is None else zero.float().T.contiguous()
        codes = torch.empty(rest.shape, dtype=torch.int8)
        for start in range(0, rest.shape[0], BLOCK):
            stop = min(start + BLOCK, rest.shape[0])
            errors = torch.empty(stop - start, rest.shape[1])
            for j in range(start, stop):
                step, shift = steps[step_of[j]], zeros[step_of[j]]
                level = (rest[j] / step + shift).round_().clamp_(grid.lowest, grid.highest)
                codes[j] = level.to(torch.int8)
                error = (rest[j] - (level - shift) * step) / upper[j, j]
                rest[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1.0)
                errors[j - start] = error
            rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
        placed = torch.empty_like(codes)
        placed[order] = codes
        return placed.T.contiguous()


def inverse_root(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor U of ``(H + floor)^-1 = U^T U``, ``(d, d)`` float64, without the inverse itself.

    With ``J`` reversing the order, ``J H J = L L^T`` gives ``H = R R^T`` with ``R = J L J`` upper triangular, and so
    ``H^-1 = R^-T R^-1``: U is ``R^-1``.
    """
    damped = moment.flip(0, 1)
    damped.diagonal().add_(damping_floor(damping, float(moment.diagonal().mean())))
    root = torch.linalg.cholesky(damped).flip(0, 1)
    return torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=True)
