"""The same kept fraction for every linear: SVD-LLM's, ASVD's without its search, and this project's baseline."""

from __future__ import annotations

from collections.abc import Sequence

from compress.allocations.curve import Curve, Ranks, spread


def uniform(curves: Sequence[Curve], budget: int) -> Ranks:
    """The same fraction of its bytes for every linear, the remainder spread one rank at a time. Raises Unreachable."""
    fraction = min(budget / sum(curve.dense for curve in curves), 1.0)
    # just below dense at most: where the budget is everything, only the remainder makes a linear dense
    return spread(curves, budget, [min(fraction * curve.dense, curve.dense - 1) for curve in curves])
