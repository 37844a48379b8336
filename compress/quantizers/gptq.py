"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): column after column, the others make up for each one's rounding error.

``min |(W - Q) H^1/2|^2``: with column j rounded, the best change of the columns that are still free is
``-(w_j - q_j) / [F^-1]_jj [F^-1]_j,:``, F the moment of column j and the free ones. All these inverses are in the
upper Cholesky factor U of ``H^-1 = U^T U`` (section 3.3): the change is ``-(w_j - q_j) / U_jj U_j,j+1:``.

Columns of large ``H_jj`` go first (act-order), in groups as they lie in the weight, whose scales are found before
(static groups): no index of groups needs to be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from scipy.linalg.lapack import dpotrf, dtrtri, spotrf, strtri

from calibration.products import subtract_product
from checkpoint.forms import Grid
from compress.quantizers.grid import Quantized, find_scales
from compress.truncation import damping_floor

# columns whose changes to later columns are applied in one product; and, before that, to those of the same block
BLOCK, FEW_COLUMNS = 128, 32
# sides of moments that are factorised in float64; wider ones, of which one would be larger than a layer, in float32 as in the
# paper's code: damping bounds the condition number
EXACT = 8192


def gptq(
    weight: torch.Tensor,
    grids: Sequence[Grid],
    inputs: torch.Tensor | None,
    outputs: torch.Tensor | None,
    damping: float,
    dtype: torch.dtype,
) -> list[Quantized]:
    """``weight`` ``(d_out, d_in)`` on each grid; ``inputs`` is H, ``(d_in, d_in)``; ``damping`` times its mean diagonal is added to it.

    ``outputs`` is not used. Raises ValueError if H is missing, torch.linalg.LinAlgError if the damped H is not positive definite.
    """
    if inputs is None:
        raise ValueError("the second moment of the input is needed")
    on = [Levels(grid, *find_scales(weight, grid, inputs.diagonal(), dtype)) for grid in grids]
    columns = Columns(inputs, damping)
    return [levels.quantized(columns.round([weight.float()], [levels])[0]) for levels in on]


@dataclass(frozen=True)
class Levels:
    """The levels of some rows on a grid: ``scale`` and ``zero`` (or None) are ``(rows, groups)``."""

    grid: Grid
    scale: torch.Tensor
    zero: torch.Tensor | None

    def of(self, rows: torch.Tensor | slice) -> Levels:
        """Those of some of the rows."""
        return Levels(self.grid, self.scale[rows], None if self.zero is None else self.zero[rows])

    def quantized(self, codes: torch.Tensor) -> Quantized:
        """Codes int8 ``(rows, d_in)`` with the levels that they are of."""
        return Quantized(codes, self.scale, self.zero, self.grid)


class Columns:
    """The order in which the columns of a weight are rounded, and how the rest make up for each; for many weights alike."""

    def __init__(self, inputs: torch.Tensor, damping: float) -> None:
        self._order = inputs.diagonal().argsort(descending=True, stable=True)
        self._upper = inverse_root(inputs, damping, self._order)
        self._pivots = self._upper.diagonal().tolist()

    def round(self, weights: Sequence[torch.Tensor], on: Sequence[Levels]) -> list[torch.Tensor]:
        """Codes int8 of each of the weights, float32 ``(rows, d_in)``, each on its levels; all go through the columns together."""
        upper = self._upper
        # a row per column of the weights: what a step touches is contiguous
        rest = self._ordered(torch.cat(list(weights)))
        steps = self._ordered(torch.cat([self._by_column(levels.scale) for levels in on]))
        shifts = None
        if any(levels.zero is not None for levels in on):
            shifts = self._ordered(torch.cat([self._shifts(levels) for levels in on]))
        counts = [len(weight) for weight in weights]
        rows = list(zip(counts, on, strict=True))
        lowest = torch.cat([rest.new_full((n,), levels.grid.lowest) for n, levels in rows])
        highest = torch.cat([rest.new_full((n,), levels.grid.highest) for n, levels in rows])
        codes = torch.empty_like(rest, dtype=torch.int8)
        for start in range(0, len(rest), BLOCK):
            stop = min(start + BLOCK, len(rest))
            levels = rest.new_empty(stop - start, rest.shape[1])
            errors = torch.empty_like(levels)
            for near in range(start, stop, FEW_COLUMNS):
                end = min(near + FEW_COLUMNS, stop)
                own = slice(near - start, end - start)
                # few operations a column: on so few numbers each costs what it takes to start it
                for j, level, error in zip(range(near, end), levels[own].unbind(), errors[own].unbind(), strict=True):
                    row, step = rest[j], steps[j]
                    torch.div(row, step, out=level)
                    if shifts is not None:
                        level.add_(shifts[j])
                    level.round_().clamp_(lowest, highest)
                    value = level if shifts is None else level - shifts[j]
                    torch.addcmul(row, value, step, value=-1.0, out=error).div_(self._pivots[j])
                    rest[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1.0)
                subtract_product(rest[end:stop], upper[near:end, end:stop].T, errors[own])
            codes[start:stop] = levels
            subtract_product(rest[stop:], upper[start:stop, stop:].T, errors)
        placed = torch.empty_like(codes)
        placed[self._order] = codes
        return [part.T.contiguous() for part in placed.split(counts, dim=1)]

    def _ordered(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.T[self._order].contiguous()

    def _by_column(self, groups: torch.Tensor) -> torch.Tensor:
        return groups.float().repeat_interleave(len(self._order) // groups.shape[1], dim=1)

    def _shifts(self, levels: Levels) -> torch.Tensor:
        return self._by_column(torch.zeros_like(levels.scale) if levels.zero is None else levels.zero)


def inverse_root(moment: torch.Tensor, damping: float, order: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor U of ``(H + floor)^-1 = U^T U``, ``(d, d)`` float32; rows and columns of H in ``order``.

    With ``J`` reversing the order, ``J H J = L L^T`` gives ``H = R R^T`` with ``R = J L J`` upper triangular, and so
    ``H^-1 = R^-T R^-1``: U is ``R^-1 = J L^-1 J``. In float64 up to ``EXACT``, and in place: one such matrix at a time. Raises
    torch.linalg.LinAlgError if the damped H is not positive definite.
    """
    backwards, exact = order.flip(0), len(order) <= EXACT
    factorise, invert = (dpotrf, dtrtri) if exact else (spotrf, strtri)
    damped = moment[backwards[:, None], backwards].to("cpu", torch.float64 if exact else torch.float32)
    damped.diagonal().add_(damping_floor(damping, float(damped.diagonal().mean(dtype=torch.float64))))
    # symmetric: a row-major array is its own column-major one, whose upper factor is the lower one here
    root, unlike = factorise(damped.numpy().T, lower=0, overwrite_a=1)
    if unlike:
        raise torch.linalg.LinAlgError("a damped second moment is not positive definite")
    inverse, _ = invert(root, lower=0, overwrite_c=1)
    turned = inverse.T
    for first in range((len(turned) + 1) // 2):  # both axes reversed, a pair of rows at a time
        last = len(turned) - 1 - first
        turned[first], turned[last] = turned[last, ::-1].copy(), turned[first, ::-1].copy()
    return torch.from_numpy(turned.astype(numpy.float32, copy=False)).to(moment.device)
