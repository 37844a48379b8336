"""Pooled allocation: bytes go where loss per byte falls most (DESIGN section 4; docs/loss-aware.md).

Needs losses in one unit for all linears, as the two-sided decomposition gives them (nats per token); with others it is
greedy in squared output error.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from compress.allocations.curve import Curve, Ranks, Unreachable

COARSE = 1e-3


class Point(NamedTuple):
    """A choice of one linear (None: dense): its bytes, and its loss."""

    nbytes: int
    loss: float
    choice: int | None


def lower_hull(curve: Curve) -> list[Point]:
    """Points of the lower convex hull of (bytes, loss), smallest first; the last is dense.

    Choices whose loss is infinite are not to be had. Raises ValueError where losses are missing.
    """
    if len(curve.loss) != curve.largest + 1 and curve.largest >= 1:
        raise ValueError(f"a loss for each of {curve.largest + 1} choices is needed, {len(curve.loss)} given")
    hull: list[Point] = []
    for choice in range(1, curve.largest + 1):
        point = Point(curve.sizes[choice], curve.loss[choice], choice)
        # on a menu of bits and ranks what is larger may lose more
        if math.isfinite(point.loss) and (not hull or point.loss < hull[-1].loss):
            _extend(hull, point)
    _extend(hull, Point(curve.dense, 0.0, None))
    return hull


def _extend(hull: list[Point], point: Point) -> None:
    while hull and hull[-1].nbytes == point.nbytes:
        hull.pop()
    while len(hull) >= 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
        hull.pop()
    hull.append(point)


def _slope(a: Point, b: Point) -> float:
    """Loss saved per byte from one point to the next."""
    return (a.loss - b.loss) / (b.nbytes - a.nbytes)


def _best_within(curve: Curve, nbytes: int) -> int:
    """The choice with the least loss among those that take no more than ``nbytes``; the larger of equals: the bytes are there."""
    return min(range(bisect_right(curve.sizes, nbytes) - 1, 0, -1), key=lambda choice: curve.loss[choice])


def pooled(curves: Sequence[Curve], budget: int) -> Ranks:
    """Spend where loss per byte falls most, along the hulls of all linears together (DESIGN section 4).

    The hulls' steps in order of slope; the first that does not fit is spent on that same linear's own choices, then
    stop. So a larger budget never makes a linear smaller, and at the hull's own budgets no other choice has less loss.
    Where that linear's choices are so coarse that more than ``COARSE`` of all bytes would be left over (an embedding's next
    bit), the steps of the others go on. Raises Unreachable; ValueError where a curve has no losses.
    """
    hulls = [lower_hull(curve) for curve in curves]
    smallest = sum(hull[0].nbytes for hull in hulls)
    if budget < smallest:
        raise Unreachable(smallest)
    choices: Ranks = [hull[0].choice for hull in hulls]
    left = budget - smallest
    steps = [(-_slope(a, b), index, a, b) for index, hull in enumerate(hulls) for a, b in pairwise(hull)]
    stopped: set[int] = set()
    for _, index, now, then in sorted(steps, key=lambda step: step[:2]):
        if index in stopped:
            continue
        choice = then.choice
        if then.nbytes - now.nbytes > left:
            stopped.add(index)
            choice = _best_within(curves[index], now.nbytes + left)
        left -= curves[index].nbytes(choice) - now.nbytes
        choices[index] = choice
        if stopped and left <= COARSE * sum(curve.dense for curve in curves):
            break
    return choices
