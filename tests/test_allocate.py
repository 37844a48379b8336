"""Budgets are met from below, by less than a rank, for any shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.allocate import Shape, Unreachable, uniform


def shape(d_out: int, d_in: int, itemsize: int = 2) -> Shape:
    return Shape(d_out * d_in * itemsize, (d_out + d_in) * itemsize, (d_out * d_in - 1) // (d_out + d_in))


SHAPES = st.lists(st.builds(shape, st.integers(8, 80), st.integers(8, 80)), min_size=1, max_size=12)


@given(SHAPES, st.floats(0.05, 0.99))
def test_uniform_meets_the_budget(shapes, ratio):
    budget = int(ratio * sum(item.dense for item in shapes))
    try:
        ranks = uniform(shapes, budget)
    except Unreachable as problem:
        assert problem.smallest > budget
        assert problem.smallest == sum(min(item.per_rank, item.dense) for item in shapes)
        return
    taken = sum(item.dense if rank is None else rank * item.per_rank for item, rank in zip(shapes, ranks, strict=True))
    assert taken <= budget
    assert all(rank is None or 1 <= rank <= item.largest for item, rank in zip(shapes, ranks, strict=True))
    growable = [
        item.per_rank for item, rank in zip(shapes, ranks, strict=True) if rank is not None and rank < item.largest
    ]
    assert not growable or budget - taken < min(growable), "one more rank would still fit"


def test_uniform_is_uniform():
    shapes = [shape(64, 64)] * 7
    ranks = uniform(shapes, int(0.7 * 7 * shapes[0].dense))
    assert max(ranks) - min(ranks) <= 1 and ranks == sorted(ranks, reverse=True)


def test_unreachable_names_the_smallest():
    with pytest.raises(Unreachable) as caught:
        uniform([shape(64, 64)] * 2, 255)
    assert caught.value.smallest == 512
