"""From a byte budget to a rank for every linear: a table of allocations, pure functions of shapes and curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


class Unreachable(ValueError):
    """The budget is below what rank one everywhere takes; ``smallest`` is that, in bytes."""

    def __init__(self, smallest: int) -> None:
        super().__init__(f"at least {smallest} bytes are needed")
        self.smallest = smallest


@dataclass(frozen=True)
class Shape:
    """A linear as the allocation sees it: bytes when dense, bytes of one rank, the largest rank that saves."""

    dense: int
    per_rank: int
    largest: int


def uniform(shapes: Sequence[Shape], budget: int) -> list[int | None]:
    """The same kept fraction for every linear, the remainder spread one rank at a time.

    Returns a rank per linear, or None where it stays dense (its rank would save nothing). Raises
    Unreachable. The bytes taken never exceed ``budget`` and fall short by less than one rank of the
    smallest linear, unless every linear is dense.
    """
    smallest = sum(min(shape.per_rank, shape.dense) for shape in shapes)
    if budget < smallest:
        raise Unreachable(smallest)
    fraction = min(budget / sum(shape.dense for shape in shapes), 1.0)
    ranks = [min(max(int(fraction * shape.dense / shape.per_rank), 1), shape.largest) for shape in shapes]

    def bytes_at(index: int, rank: int) -> int:
        return shapes[index].dense if rank > shapes[index].largest or rank < 1 else rank * shapes[index].per_rank

    left = budget - sum(bytes_at(index, rank) for index, rank in enumerate(ranks))
    while left < 0:  # only where many linears were lifted to rank one
        largest = max(range(len(ranks)), key=lambda index: (ranks[index], -index))
        ranks[largest] -= 1
        left += shapes[largest].per_rank
    # largest shortfall first; earlier linears first among equals
    order = sorted(
        range(len(shapes)),
        key=lambda index: (ranks[index] - fraction * shapes[index].dense / shapes[index].per_rank, index),
    )
    grew = True
    while grew:
        grew = False
        for index in order:
            step = bytes_at(index, ranks[index] + 1) - bytes_at(index, ranks[index])
            if 1 <= ranks[index] <= shapes[index].largest and step <= left:
                ranks[index] += 1
                left -= step
                grew = True
    return [rank if 1 <= rank <= shape.largest else None for rank, shape in zip(ranks, shapes, strict=True)]


ALLOCATIONS: dict[str, Callable[[Sequence[Shape], int], list[int | None]]] = {"uniform": uniform}
