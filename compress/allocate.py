"""From a byte budget to a rank for every linear: a table of allocations, pure functions of sizes and loss curves.

To add one: a function of ``(curves, budget)`` that returns a rank per linear (None: dense), and a line in ``ALLOCATIONS``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class Unreachable(ValueError):
    """The budget is below what rank one everywhere takes; ``smallest`` is that, in bytes."""

    def __init__(self, smallest: int) -> None:
        super().__init__(f"at least {smallest} bytes are needed")
        self.smallest = smallest


@dataclass(frozen=True)
class Curve:
    """A linear as the allocation sees it: bytes when dense, and bytes at rank 0, 1, ... up to the largest that saves.

    ``loss[r]`` for the same ranks is what truncation at r costs (dense costs nothing), in one unit for all linears;
    empty where it is not known, which only some allocations can do without.
    """

    dense: int
    sizes: tuple[int, ...]
    loss: tuple[float, ...] = ()

    @property
    def largest(self) -> int:
        """The largest rank that saves; 0 where none does."""
        return len(self.sizes) - 1

    def nbytes(self, rank: int | None) -> int:
        """Bytes at a rank; None is dense."""
        return self.dense if rank is None else self.sizes[rank]

    @property
    def smallest(self) -> int:
        """Bytes at rank one, or dense where no rank saves."""
        return self.sizes[1] if self.largest >= 1 else self.dense

    def rank_within(self, nbytes: float) -> int:
        """The largest rank (0 at least) that takes no more than ``nbytes``."""
        return max(bisect_right(self.sizes, nbytes) - 1, 0)


Ranks = list[int | None]


def _start(curves: Sequence[Curve], budget: int) -> Ranks:
    """Rank one everywhere (dense where no rank saves); raises Unreachable."""
    smallest = sum(curve.smallest for curve in curves)
    if budget < smallest:
        raise Unreachable(smallest)
    return [1 if curve.largest >= 1 else None for curve in curves]


def uniform(curves: Sequence[Curve], budget: int) -> Ranks:
    """The same kept fraction for every linear, the remainder spread one rank at a time.

    Raises Unreachable. The bytes taken never exceed ``budget``, and no rank more would fit.
    """
    ranks = _start(curves, budget)
    fraction = min(budget / sum(curve.dense for curve in curves), 1.0)
    for index, curve in enumerate(curves):
        if curve.largest >= 1:
            ranks[index] = max(curve.rank_within(fraction * curve.dense), 1)
    left = budget - sum(curve.nbytes(rank) for curve, rank in zip(curves, ranks, strict=True))
    while left < 0:  # only where linears were lifted to rank one, or are dense because no rank saves
        index = max(range(len(ranks)), key=lambda i: (ranks[i] or 0, -i))
        widest = ranks[index] or 0
        ranks[index] = widest - 1
        left += curves[index].sizes[widest] - curves[index].sizes[widest - 1]

    def shortfall(index: int) -> float:
        """What the linear lacks to its share, in ranks."""
        curve, rank = curves[index], ranks[index]
        if rank is None or rank >= curve.largest:
            return 0.0
        return (fraction * curve.dense - curve.sizes[rank]) / (curve.sizes[rank + 1] - curve.sizes[rank])

    # largest shortfall first; earlier linears first among equals
    order = sorted(range(len(curves)), key=lambda i: (-shortfall(i), i))
    grew = True
    while grew:
        grew = False
        for index in order:
            rank, curve = ranks[index], curves[index]
            if rank is None:
                continue
            wider = rank + 1 if rank < curve.largest else None
            step = curve.nbytes(wider) - curve.nbytes(rank)
            if step <= left:
                ranks[index] = wider
                left -= step
                grew = True
    return ranks


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
    ranks = _start(curves, budget)
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


@dataclass(frozen=True)
class Allocation:
    """An allocation, and whether it reads the curves' losses (known only after collecting)."""

    choose: Callable[[Sequence[Curve], int], Ranks]
    reads_losses: bool


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(uniform, reads_losses=False),
    "pooled": Allocation(pooled, reads_losses=True),
}
