"""A linear as the allocations see it, and what they share: pure numbers, no tensors."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Ranks = list[int | None]


class Unreachable(ValueError):
    """The budget is below what rank one everywhere takes; ``smallest`` is that, in bytes."""

    def __init__(self, smallest: int) -> None:
        super().__init__(f"at least {smallest} bytes are needed")
        self.smallest = smallest


@dataclass(frozen=True)
class Curve:
    """Bytes when dense, and bytes at rank 0, 1, ... up to the largest that saves.

    ``loss[r]`` for the same ranks is the method's objective when truncated at r (dense costs nothing), per token, over
    ``tokens`` tokens; ``spectrum`` is the weight's own singular values, all of them, largest first. Either is empty
    where it is not known: an allocation says what it reads. ``influence`` is the layer's; ``sensitivity`` the
    model's loss with this linear alone compressed, at each of a list of ratios. ``layer`` and ``role``
    (calibration/roles.py) say where it is.
    """

    dense: int
    sizes: tuple[int, ...]
    loss: tuple[float, ...] = ()
    spectrum: tuple[float, ...] = ()
    layer: int = 0
    role: str = ""
    tokens: int = 1
    influence: float | None = None
    sensitivity: tuple[float, ...] = ()

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


def taken(curves: Sequence[Curve], ranks: Ranks) -> int:
    """Bytes of a choice."""
    return sum(curve.nbytes(rank) for curve, rank in zip(curves, ranks, strict=True))


def start(curves: Sequence[Curve], budget: int) -> Ranks:
    """Rank one everywhere (dense where no rank saves); raises Unreachable."""
    smallest = sum(curve.smallest for curve in curves)
    if budget < smallest:
        raise Unreachable(smallest)
    return [1 if curve.largest >= 1 else None for curve in curves]


def grow_towards(curves: Sequence[Curve], budget: int, ranks: Ranks, wanted: Ranks) -> Ranks:
    """Widen linears towards another choice, in order, by as many ranks as the budget still has."""
    grown = list(ranks)
    left = budget - taken(curves, ranks)
    for index, (curve, rank, goal) in enumerate(zip(curves, ranks, wanted, strict=True)):
        if rank is not None and goal != rank:
            limit = curve.largest if goal is None else goal
            reached = max(min(curve.rank_within(curve.nbytes(rank) + left), limit), rank)
            left -= curve.nbytes(reached) - curve.nbytes(rank)
            grown[index] = reached
    return grown


def lowest_threshold(
    curves: Sequence[Curve], budget: int, thresholds: Sequence[float], choose: Callable[[float], Ranks]
) -> Ranks:
    """The choice at the lowest of the rising thresholds that fits, then as many ranks of the next lower one as fit.

    Bytes must never grow with the threshold; the highest must fit; below the lowest everything is dense.
    """
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if taken(curves, choose(thresholds[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    wider: Ranks = choose(thresholds[high - 1]) if high > 0 else [None] * len(curves)
    return grow_towards(curves, budget, choose(thresholds[high]), wider)


def spread(curves: Sequence[Curve], budget: int, shares: Sequence[float]) -> Ranks:
    """Ranks that take each linear's share of bytes (dense where the share allows it), the remainder one rank at a time.

    Raises Unreachable. The bytes taken never exceed ``budget``, and no rank more would fit.
    """
    ranks = start(curves, budget)
    for index, (curve, share) in enumerate(zip(curves, shares, strict=True)):
        if curve.largest >= 1:
            ranks[index] = None if share >= curve.dense else max(curve.rank_within(share), 1)
    left = budget - taken(curves, ranks)
    while left < 0:  # where linears were lifted to rank one or are dense because no rank saves, or shares are too large
        lowerable = [i for i, rank in enumerate(ranks) if rank != 1 and curves[i].largest]
        index = max(lowerable, key=lambda i: (curves[i].nbytes(ranks[i]), -i))
        curve, rank = curves[index], ranks[index]
        smaller = curve.largest if rank is None else rank - 1
        left += curve.nbytes(rank) - curve.nbytes(smaller)
        ranks[index] = smaller

    def shortfall(index: int) -> float:
        """What the linear lacks to its share, in ranks."""
        curve, rank = curves[index], ranks[index]
        if rank is None or rank >= curve.largest:
            return 0.0
        return (shares[index] - curve.sizes[rank]) / (curve.sizes[rank + 1] - curve.sizes[rank])

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
