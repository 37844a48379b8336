"""Integer grids: which weights share a scale, and the scale that loses least. Pure functions of tensors.

A grid has ``2^bits`` levels; ``group_size`` neighbouring inputs of a row share a scale (and a zero point, if asymmetric).
Codes are signed, from ``-2^(bits-1)``, as compressed-tensors packs them; the value is ``(code - zero) * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from checkpoint.forms import Grid
from compress.counts import count

SEARCHED = 1 << 18  # weights whose scales are searched at a time: what they are tried in stays in the cache
# the search for a clipped range: by how much of a group's range it shrinks in so many steps, and how many it passes by at first
SHRINKING, STEPS, COARSE = 0.02, 31, 3


@dataclass(frozen=True)
class Quantized:
    """``codes`` int8 ``(d_out, d_in)``; ``scale`` ``(d_out, groups)`` in the dtype it is stored in; ``zero`` int8 or None (zero)."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    grid: Grid

    def dense(self) -> torch.Tensor:
        """The weight that the codes stand for, ``(d_out, d_in)`` float32."""
        return values(self.codes, self.scale, self.zero)


def values(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """``(code - zero) * scale`` in float32, ``(d_out, d_in)``."""
    grouped = codes.float().unflatten(1, (scale.shape[1], -1))
    if zero is not None:
        grouped = grouped - zero.float().unsqueeze(2)
    return (grouped * scale.float().unsqueeze(2)).flatten(1)


def round_to(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> torch.Tensor:
    """The nearest codes, int8 ``(rows, groups, n)``, of ``weight`` of that shape; ``scale`` and ``zero`` ``(rows, groups)``."""
    shifted = weight / scale.to(weight.dtype).unsqueeze(2)
    if zero is not None:
        shifted = shifted + zero.to(weight.dtype).unsqueeze(2)
    return shifted.round_().clamp_(grid.lowest, grid.highest).to(torch.int8)


def find_scales(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points ``(d_out, groups)`` of ``weight`` ``(d_out, d_in)``.

    Each group's range is shrunk step by step, and the range with the least squared error, each input counted by ``importance``
    ``(d_in,)``, is kept. Scales are rounded to ``dtype``, in which they are stored, before any code is chosen.
    """
    counted = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    count("inputs that the text never excites, counted a little", int((counted == 0).sum()))
    # an input that the text never excited still counts a little: its weights must not be clipped away
    counted = counted + 1e-3 * counted.mean() + torch.finfo(torch.float32).tiny
    found = [_search(rows, grid, counted, dtype) for rows in weight.split(max(1, SEARCHED // weight.shape[1]))]
    scale = torch.cat([scale for scale, _ in found])
    return scale, None if grid.symmetric else torch.cat([zero for _, zero in found])


def _search(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points (nought where the grid has none) of some rows.

    Every ``COARSE``-th part is tried, then each group's neighbours of its best.
    """
    groups = grid.groups(weight.shape[1])
    grouped, counted = weight.float().unflatten(1, (groups, -1)), importance.unflatten(0, (groups, -1))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    count("groups of zeros, of scale one", int((low == high).sum()))
    best = torch.full_like(low, torch.inf)
    levels = torch.empty_like(grouped)
    scale, zero = torch.ones_like(low, dtype=dtype), torch.zeros_like(low, dtype=torch.int8)
    step, turned = torch.zeros_like(low), torch.zeros_like(low, dtype=torch.bool)

    def attempt(steps: torch.Tensor, mirrored: torch.Tensor) -> None:
        part = 1.0 - SHRINKING * steps
        tried, shift = _scale(low * part, high * part, grid, mirrored, dtype)
        wide = tried.float().unsqueeze(2)
        torch.div(grouped, wide, out=levels)
        if shift is not None:
            levels.add_(shift.float().unsqueeze(2))
        levels.round_().clamp_(grid.lowest, grid.highest)
        if shift is not None:
            levels.sub_(shift.float().unsqueeze(2))
        error = levels.mul_(wide).sub_(grouped).square_().mul_(counted).sum(2)
        better = error < best
        for kept, other in ((best, error), (scale, tried), (step, steps), (turned, mirrored)):
            torch.where(better, other, kept, out=kept)
        if shift is not None:
            torch.where(better, shift, zero, out=zero)

    signs = (False, True) if grid.symmetric and not grid.power_of_two else (False,)
    for steps, mirrored in product(range(0, STEPS, COARSE), signs):
        attempt(torch.full_like(low, steps), torch.full_like(turned, mirrored))
    centre, side = step.clone(), turned.clone()
    for offset in (offset for offset in range(1 - COARSE, COARSE) if offset):
        attempt((centre + offset).clamp(0, STEPS - 1), side)
    return scale, zero


def _scale(
    low: torch.Tensor, high: torch.Tensor, grid: Grid, mirrored: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale that spans ``low`` to ``high``, as it is stored; 1 where the range is empty.

    A symmetric grid has a level more on the negative side; ``mirrored`` groups turn it over by a negative scale (which a bare
    exponent cannot hold).
    """
    if not grid.symmetric:
        wide = (high - low) / (grid.highest - grid.lowest)
    else:
        up, down = torch.where(mirrored, -low, high), torch.where(mirrored, high, -low)
        wide = torch.maximum(down / -grid.lowest, up / grid.highest)
    if grid.power_of_two:
        wide = torch.exp2(torch.log2(wide).ceil().clamp(-126, 127))
    scale = torch.where(wide > torch.finfo(dtype).tiny, wide, torch.ones_like(wide)).to(dtype)
    if grid.symmetric:
        return torch.where(mirrored, -scale, scale), None
    zero = (grid.lowest - low / scale.float()).round_().clamp_(grid.lowest, grid.highest)
    return scale, zero.to(torch.int8)
