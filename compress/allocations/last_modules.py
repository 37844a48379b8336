"""LLM-ROM's schedule: only the last decoder layers are compressed (Chavan et al. 2023, arXiv 2312.07046, section 3).

The paper compresses the last 8, 12 and 24 of 32 layers for a decoder of 90, 80 and 50 %, each to the same budget (0.60, 0.46,
0.33). Those three are on one line: the share of layers is ``0.25 + 1.25 (0.9 - ratio)``; the budget inside follows from the ratio.
"""

from __future__ import annotations

from collections.abc import Sequence

from compress.allocations.curve import Curve, Ranks, spread, start


def last_modules(curves: Sequence[Curve], budget: int) -> Ranks:
    """Dense but for the last layers, uniform inside them. Raises Unreachable.

    Where what is left to those layers is below rank one, more layers are taken.
    """
    start(curves, budget)
    dense = sum(curve.dense for curve in curves)
    layers = sorted({curve.layer for curve in curves})
    ratio = budget / dense
    count = min(max(round((0.25 + 1.25 * (0.9 - ratio)) * len(layers)), 1), len(layers))
    while True:
        first = layers[len(layers) - count]
        late = [curve for curve in curves if curve.layer >= first]
        left = budget - sum(curve.dense for curve in curves if curve.layer < first)
        if left >= sum(curve.smallest for curve in late):
            break
        count += 1
    fraction = min(left / sum(curve.dense for curve in late), 1.0)
    shares = [curve.dense if curve.layer < first else min(fraction * curve.dense, curve.dense - 1) for curve in curves]
    return spread(curves, budget, shares)
