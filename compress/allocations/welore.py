"""WeLore: one threshold on every weight's normalised singular values (Jaiswal et al. 2024, arXiv 2407.11239, section 3).

``s_i = (sigma_i - min) / (max - min)`` of each weight; the rank is the number of ``s_i`` at or above the threshold, which is found
for the asked size instead of the paper's table for two models. A linear whose factors would not be smaller stays dense
(the paper's N-LRC); the reference code may enlarge it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from compress.allocations.curve import Curve, Ranks, lowest_threshold, start


def normalised(spectrum: Sequence[float]) -> list[float]:
    """Singular values scaled to 1 ... 0, largest first; all 1 where they are equal."""
    high, low = spectrum[0], spectrum[-1]
    return [(value - low) / (high - low) if high > low else 1.0 for value in spectrum]


def at_threshold(curve: Curve, threshold: float) -> int | None:
    """The rank at a threshold on the normalised spectrum; None (dense) where that saves nothing."""
    values = normalised(curve.spectrum)
    rank = len(values) - bisect_left(values[::-1], threshold)
    if curve.largest < 1 or rank > curve.largest:
        return None
    return max(rank, 1)


def welore(curves: Sequence[Curve], budget: int) -> Ranks:
    """The lowest threshold that fits, then as many ranks of the next lower one as fit.

    Raises Unreachable; ValueError where a curve has no spectrum.
    """
    start(curves, budget)
    if any(not curve.spectrum for curve in curves):
        raise ValueError("singular values of every weight are needed")
    thresholds = sorted({value for curve in curves for value in normalised(curve.spectrum)}) + [2.0]
    return lowest_threshold(
        curves, budget, thresholds, lambda threshold: [at_threshold(curve, threshold) for curve in curves]
    )
