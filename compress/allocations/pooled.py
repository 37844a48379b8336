"""Pooled allocation: rank one where loss per byte falls most (DESIGN section 4; docs/loss-aware.md).

Needs losses in one unit for all linears, as the two-sided decomposition gives them (nats per token); with others it is
greedy in squared output error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.allocations.curve import Curve, Ranks, start


@dataclass(frozen=True)
class _Step:
    """A step along a hull: what it saves per byte, whose it is, and where it leads (None: dense)."""

    slope: float
    index: int
    to: int | None


def hull_steps(curve: Curve, index: int) -> list[_Step]:
    """Steps from rank one along the lower convex hull of (bytes, loss), steepest first; the last leads to dense."""
    if curve.largest < 1:
        return []
    if len(curve.loss) != curve.largest + 1:
        raise ValueError(f"a loss for each of {curve.largest + 1} ranks is needed, {len(curve.loss)} given")
    points: list[tuple[int, float, int | None]] = [
        (curve.sizes[rank], curve.loss[rank], rank) for rank in range(1, curve.largest + 1)
    ]
    points.append((curve.dense, 0.0, None))
    hull: list[tuple[int, float, int | None]] = []
    for point in points:
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [_Step(_slope(a, b), index, b[2]) for a, b in zip(hull, hull[1:], strict=False)]


def _slope(a: tuple[int, float, int | None], b: tuple[int, float, int | None]) -> float:
    """Loss saved per byte from one point to the next."""
    return (a[1] - b[1]) / (b[0] - a[0])


def pooled(curves: Sequence[Curve], budget: int) -> Ranks:
    """Take rank one where loss per byte falls most, along the hulls of all linears together (DESIGN section 4).

    The hulls' steps in order of slope; the first that does not fit is spent on that same linear's own ranks, then
    stop. So a larger budget never lowers a rank, and at the hull's own budgets no other choice has less loss.
    Raises Unreachable; ValueError where a curve has no losses.
    """
    ranks = start(curves, budget)
    left = budget - sum(curve.smallest for curve in curves)
    steps = [step for index, curve in enumerate(curves) for step in hull_steps(curve, index)]
    for step in sorted(steps, key=lambda step: (-step.slope, step.index)):
        curve, now = curves[step.index], ranks[step.index]
        cost = curve.nbytes(step.to) - curve.nbytes(now)
        if cost > left:
            ranks[step.index] = curve.rank_within(curve.nbytes(now) + left)
            break
        ranks[step.index] = step.to
        left -= cost
    return ranks
