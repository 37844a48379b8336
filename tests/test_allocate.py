"""Budgets are met from below, by less than a rank, for any shapes; the pool is optimal on its hull and monotone."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from calibration.structure import Linear
from checkpoint.forms import Grid
from compress.allocations import ALLOCATIONS, Curve, Unreachable
from compress.allocations.curve import taken
from compress.allocations.pooled import lower_hull, pooled
from compress.allocations.sensitivity import RATIOS
from compress.allocations.uniform import uniform
from compress.allocations.welore import at_threshold
from compress.menu import Storage
from compress.pivoting import PART_FORMS


def curve(d_out: int, d_in: int, seed: int = 0, form: str = "factors", layer: int = 0, role: str = "query") -> Curve:
    """A linear of a random falling, not always convex, loss."""
    linear = Linear("", "", layer, d_out, d_in, transposed=False, has_bias=False, dtype=torch.bfloat16, role=role)
    sizes = Storage(form).sizes(linear)
    generator = torch.Generator().manual_seed(seed)
    power = torch.rand(len(sizes) - 1, generator=generator, dtype=torch.float64) ** 4
    power = power.sort(descending=True).values if seed % 2 else power
    loss = torch.cat([power.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)]) + 1e-3
    spectrum = torch.rand(min(d_out, d_in), generator=generator, dtype=torch.float64).sort(descending=True).values
    searched = tuple(
        torch.rand(len(RATIOS), generator=generator, dtype=torch.float64).sort(descending=True).values.tolist()
    )
    found = Curve(d_out * d_in * 2, sizes, tuple(loss.tolist()), tuple(spectrum.tolist()), layer, role, tokens=1000)
    return replace(found, sensitivity=searched)


FORM = st.sampled_from(sorted(PART_FORMS))
ROLE = st.sampled_from(["query", "key", "value", "attention output", "up", "other"])
SIDE = st.integers(2, 60)
CURVES = st.lists(
    st.builds(curve, SIDE, SIDE, st.integers(0, 99), FORM, st.integers(0, 3), ROLE), min_size=1, max_size=12
)


def loss(curves: list[Curve], ranks: list[int | None]) -> float:
    return sum(0.0 if rank is None else item.loss[rank] for item, rank in zip(curves, ranks, strict=True))


@pytest.mark.parametrize("name", ALLOCATIONS)
@given(curves=CURVES, ratio=st.floats(0.05, 1.0))
def test_the_budget_is_met(name, curves, ratio):
    allocation = ALLOCATIONS[name].choose
    budget = int(ratio * sum(item.dense for item in curves))
    try:
        ranks = allocation(curves, budget)
    except Unreachable as problem:
        assert problem.smallest > budget
        if name not in ("block-influence", "sensitivity"):
            assert problem.smallest == sum(item.smallest for item in curves)
        return
    assert taken(curves, ranks) <= budget
    if name == "block-influence":
        assert set(ranks) <= {0, None}
        return
    assert all(rank is None or 1 <= rank <= item.largest for item, rank in zip(curves, ranks, strict=True))
    if name not in ("pooled", "welore", "sensitivity"):
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
    """As long as no step is coarse; of a few tiny linears every one is."""
    dense = sum(item.dense for item in curves)
    floor = sum(item.smallest for item in curves)
    small, large = sorted(floor + int(ratio * (dense - floor)) for ratio in (one, other))

    def order(ranks: list[int | None]) -> list[float]:
        return [float("inf") if rank is None else rank for rank in ranks]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["compress.allocations.pooled"], "COARSE", 1.0)
        pairs = zip(order(pooled(curves, small)), order(pooled(curves, large)), strict=True)
    assert all(before <= after for before, after in pairs)


def hull_steps(curves: list[Curve]) -> list[tuple[int, int | None]]:
    """Whose choice becomes which, steepest first."""
    steps = []
    for index, item in enumerate(curves):
        for a, b in itertools.pairwise(lower_hull(item)):
            steps.append((-(a.loss - b.loss) / (b.nbytes - a.nbytes), index, b.choice))
    return [(index, choice) for _, index, choice in sorted(steps, key=lambda step: step[:2])]


@given(
    st.lists(st.builds(curve, st.integers(3, 9), st.integers(3, 9), st.integers(0, 99), FORM), min_size=1, max_size=3),
    st.floats(0, 1),
)
def test_pooled_against_brute_force(curves, fraction):
    """Optimal at the hull's own budgets; elsewhere at most one hull step's loss away."""
    floor, dense = sum(item.smallest for item in curves), sum(item.dense for item in curves)
    choices = [[*range(1, item.largest + 1), None] for item in curves]
    everything = [(taken(curves, list(pick)), loss(curves, list(pick))) for pick in itertools.product(*choices)]
    steps = hull_steps(curves)

    def best(budget: int) -> float:
        return min(cost for size, cost in everything if size <= budget)

    ranks: list[int | None] = [choice[0] for choice in choices]
    worst = 0.0
    for index, choice in steps:
        before = loss(curves, ranks)
        ranks[index] = choice
        worst = max(worst, before - loss(curves, ranks))
        assert pooled(curves, taken(curves, ranks)) == ranks
        assert loss(curves, ranks) <= best(taken(curves, ranks)) + 1e-9
    budget = floor + int(fraction * (dense - floor))
    assert loss(curves, pooled(curves, budget)) <= best(budget) + worst + 1e-9


def mixed(seed: int) -> Curve:
    """A menu of ranks, bits and corrections, whose losses do not follow the bytes, and some of which are not to be had."""
    linear = Linear("", "", 0, 16, 32, transposed=False, has_bias=False, dtype=torch.bfloat16, role="up")
    grids = (Grid(2, 8), Grid(4, 8), Grid(4), Grid(8))
    sizes = Storage("pivoted", grids=grids, correction_ranks=(0, 2, 5)).sizes(linear)
    generator = torch.Generator().manual_seed(seed)
    losses = (torch.tensor(sizes, dtype=torch.float64).clamp(min=1) / 1000).pow(-2) * torch.exp(
        torch.randn(len(sizes), generator=generator, dtype=torch.float64)
    )
    losses[torch.rand(len(sizes), generator=generator) < 0.3] = math.inf
    losses[seed % 5 + 1] = 1e3  # something is always there
    return Curve(linear.nbytes, sizes, tuple(losses.tolist()))


@given(st.lists(st.integers(0, 999), min_size=1, max_size=5), st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_pooled_menus_against_integer_programming(seeds, fraction):
    """Equal to the optimum of scipy's milp at the hull's own budgets, at most the last step's loss from it elsewhere."""
    curves = [mixed(seed) for seed in seeds]
    hulls = [lower_hull(item) for item in curves]

    def optimum(budget: int) -> float:
        options = [
            [(item.sizes[choice], item.loss[choice]) for choice in range(1, item.largest + 1)] + [(item.dense, 0.0)]
            for item in curves
        ]
        flat = [(index, *option) for index, item in enumerate(options) for option in item if math.isfinite(option[1])]
        one_each = [[float(index == row) for index, _, _ in flat] for row in range(len(curves))]
        found = milp(
            [cost for _, _, cost in flat],
            integrality=[1] * len(flat),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint([[size for _, size, _ in flat]], -math.inf, budget),
            ],
            options={"mip_rel_gap": 0.0},
        )
        return float(found.fun)

    choices: list[int | None] = [hull[0].choice for hull in hulls]
    worst = 0.0
    for index, choice in hull_steps(curves):
        before = loss(curves, choices)
        choices[index] = choice
        worst = max(worst, before - loss(curves, choices))
        budget = taken(curves, choices)
        assert pooled(curves, budget) == choices
        assert loss(curves, choices) == pytest.approx(optimum(budget), rel=1e-5, abs=1e-5)
    floor, dense = sum(hull[0].nbytes for hull in hulls), sum(item.dense for item in curves)
    budget = floor + int(fraction * (dense - floor))
    found = pooled(curves, budget)
    assert taken(curves, found) <= budget
    assert loss(curves, found) <= optimum(budget) + worst + 1e-5


def square(role: str, layer: int = 0, seed: int = 1) -> Curve:
    return curve(64, 64, seed, layer=layer, role=role)


@pytest.mark.parametrize(("ratio", "modules", "inside"), [(0.9, 8, 0.60), (0.8, 12, 0.4667), (0.5, 24, 1 / 3)])
def test_last_modules_is_the_papers_schedule(ratio, modules, inside):
    """LLM-ROM, section 3: the last 8, 12 and 24 of 32 modules at .60, .46 (.4667 meets the ratio) and .33."""
    curves = [square(role, layer) for layer in range(32) for role in ("query", "up")]
    ranks = ALLOCATIONS["last-modules"].choose(curves, int(ratio * sum(item.dense for item in curves)))
    assert [rank is None for rank in ranks] == [item.layer < 32 - modules for item in curves]
    late = [item.nbytes(rank) for item, rank in zip(curves, ranks, strict=True) if rank is not None]
    assert abs(sum(late) / (len(late) * curves[0].dense) - inside) < 0.005


@pytest.mark.parametrize(("rho", "low", "high"), [(0.5, 0.25, 0.75), (0.8, 0.6, 1.0)])
def test_attention_types_are_lorap_s(rho, low, high):
    """LoRAP: q, k keep rho / 2 and v, o 3 rho / 2; where that would not save, v, o stay dense and q, k keep 2 rho - 1."""
    roles = ("query", "key", "value", "attention output", "up")
    curves = [square(role, layer) for layer in range(4) for role in roles]
    ranks = ALLOCATIONS["attention-types"].choose(curves, int(rho * sum(item.dense for item in curves)))
    expected = {"query": low, "key": low, "value": high, "attention output": high, "up": rho}
    for item, rank in zip(curves, ranks, strict=True):
        assert abs(item.nbytes(rank) / item.dense - expected[item.role]) < 0.04


def test_welore_ranks_count_singular_values_above_one_threshold():
    curves = [curve(48, 32, seed) for seed in range(6)]
    dense = sum(item.dense for item in curves)
    ranks = ALLOCATIONS["welore"].choose(curves, int(0.6 * dense))
    assert abs(taken(curves, ranks) / dense - 0.6) < 0.01
    for threshold in (0.0, 0.3, 0.7):
        for item in curves:
            values = [(s - item.spectrum[-1]) / (item.spectrum[0] - item.spectrum[-1]) for s in item.spectrum]
            rank = at_threshold(item, threshold)
            count = sum(value >= threshold for value in values)
            assert rank == (None if count > item.largest else count)
    between = [
        item.spectrum[rank] if rank is not None else item.spectrum[item.largest]
        for item, rank in zip(curves, ranks, strict=True)
    ]
    normal = [
        (value - item.spectrum[-1]) / (item.spectrum[0] - item.spectrum[-1])
        for value, item in zip(between, curves, strict=True)
    ]
    assert max(normal) - min(normal) < 0.2, "the first value that is dropped is about the same everywhere"


def test_truncation_loss_takes_less_from_what_loses_more():
    """SVD-LLM V2: removed shares within a role are as 1 / log L."""
    curves = [
        replace(square("up", layer), loss=tuple(10.0**layer * (1 - r / 33) for r in range(33))) for layer in range(4)
    ]
    ranks = ALLOCATIONS["truncation-loss"].choose(curves, int(0.7 * sum(item.dense for item in curves)))
    assert all(rank is not None for rank in ranks) and ranks == sorted(ranks)
    at = uniform(curves, int(0.7 * sum(item.dense for item in curves)))
    logs = [math.log(math.sqrt(1000 * item.loss[rank])) for item, rank in zip(curves, at, strict=True)]
    removed = [1 - item.nbytes(rank) / item.dense for item, rank in zip(curves, ranks, strict=True)]
    expected = [0.3 * 4 * (1 / one) / sum(1 / other for other in logs) for one in logs]
    assert all(abs(a - b) < 0.03 for a, b in zip(removed, expected, strict=True))


def test_what_a_coarse_step_leaves_goes_to_others():
    """The steepest step, a whole bit of a large embedding, does not fit: the budget is spent all the same."""
    coarse = Curve(16000, (0, 2000, 4000), (0.0, 10.0, 1.0))
    fine = Curve(2000, tuple(range(0, 2000, 10)), tuple(1.0 / (1 + rank) for rank in range(200)))
    choices = pooled([coarse, fine], 2000 + 1500)
    assert choices[0] == 1 and taken([coarse, fine], choices) > 3450
