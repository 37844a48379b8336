"""Budgets are met from below, by less than a rank, for any shapes; the pool is optimal on its hull and monotone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.forms import FORMS
from compress.allocate import Curve, Unreachable, hull_steps, pooled, uniform


def curve(d_out: int, d_in: int, seed: int = 0, form: str = "factors") -> Curve:
    """A linear of a random falling, not always convex, loss."""
    sizes = FORMS[form].sizes(d_out, d_in, itemsize=2)
    power = torch.rand(len(sizes) - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
    power = power.sort(descending=True).values if seed % 2 else power
    loss = torch.cat([power.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)]) + 1e-3
    return Curve(d_out * d_in * 2, sizes, tuple(loss.tolist()))


FORM = st.sampled_from(sorted(FORMS))
CURVES = st.lists(
    st.builds(curve, st.integers(2, 60), st.integers(2, 60), st.integers(0, 99), FORM), min_size=1, max_size=12
)


def taken(curves: list[Curve], ranks: list[int | None]) -> int:
    return sum(item.nbytes(rank) for item, rank in zip(curves, ranks, strict=True))


def loss(curves: list[Curve], ranks: list[int | None]) -> float:
    return sum(0.0 if rank is None else item.loss[rank] for item, rank in zip(curves, ranks, strict=True))


@pytest.mark.parametrize("allocation", [uniform, pooled])
@given(curves=CURVES, ratio=st.floats(0.05, 1.0))
def test_the_budget_is_met(allocation, curves, ratio):
    budget = int(ratio * sum(item.dense for item in curves))
    try:
        ranks = allocation(curves, budget)
    except Unreachable as problem:
        assert problem.smallest == sum(item.smallest for item in curves) > budget
        return
    assert taken(curves, ranks) <= budget
    assert all(rank is None or 1 <= rank <= item.largest for item, rank in zip(curves, ranks, strict=True))
    if allocation is uniform:
        pairs = zip(curves, ranks, strict=True)
        growable = [item.sizes[rank + 1] - item.sizes[rank] for item, rank in pairs if rank and rank < item.largest]
        assert not growable or budget - taken(curves, ranks) < min(growable), "one more rank would still fit"


def test_uniform_is_uniform():
    curves = [curve(64, 64)] * 7
    ranks = uniform(curves, int(0.7 * 7 * curves[0].dense))
    assert max(ranks) - min(ranks) <= 1 and ranks == sorted(ranks, reverse=True)


def test_unreachable_names_the_smallest():
    for allocation in (uniform, pooled):
        with pytest.raises(Unreachable) as caught:
            allocation([curve(64, 64)] * 2, 255)
        assert caught.value.smallest == 512


@given(CURVES, st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_a_larger_budget_never_lowers_a_rank(curves, one, other):
    dense = sum(item.dense for item in curves)
    floor = sum(item.smallest for item in curves)
    small, large = sorted(floor + int(ratio * (dense - floor)) for ratio in (one, other))

    def order(ranks: list[int | None]) -> list[float]:
        return [float("inf") if rank is None else rank for rank in ranks]

    pairs = zip(order(pooled(curves, small)), order(pooled(curves, large)), strict=True)
    assert all(before <= after for before, after in pairs)


@given(
    st.lists(st.builds(curve, st.integers(3, 9), st.integers(3, 9), st.integers(0, 99), FORM), min_size=1, max_size=3),
    st.floats(0, 1),
)
def test_pooled_against_brute_force(curves, fraction):
    """Optimal at the hull's own budgets; elsewhere at most one hull step's loss away."""
    floor, dense = sum(item.smallest for item in curves), sum(item.dense for item in curves)
    choices = [[*range(1, item.largest + 1), None] for item in curves]
    everything = [(taken(curves, list(pick)), loss(curves, list(pick))) for pick in itertools.product(*choices)]
    steps = [step for index, item in enumerate(curves) for step in hull_steps(item, index)]
    steps.sort(key=lambda step: (-step.slope, step.index))

    def best(budget: int) -> float:
        return min(cost for size, cost in everything if size <= budget)

    ranks: list[int | None] = [choice[0] for choice in choices]
    worst = 0.0
    for step in steps:
        before = loss(curves, ranks)
        ranks[step.index] = step.to
        worst = max(worst, before - loss(curves, ranks))
        assert pooled(curves, taken(curves, ranks)) == ranks
        assert loss(curves, ranks) <= best(taken(curves, ranks)) + 1e-9
    budget = floor + int(fraction * (dense - floor))
    assert loss(curves, pooled(curves, budget)) <= best(budget) + worst + 1e-9
