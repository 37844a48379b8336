"""Quantizers against their definitions: the grid, the nearest code, and GPTQ against a direct solve of its normal equations."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.parallel import each, start
from compress.quantizers import QUANTIZERS, Grid, two_sided
from compress.quantizers import grid as grids
from compress.quantizers.gptq import EXACT, Columns, Levels, gptq, inverse_root
from compress.quantizers.grid import find_scales, round_to, values

GRIDS = [
    Grid(bits, group, symmetric, power)
    for bits in (2, 3, 4, 8)
    for group in (0, 8)
    for symmetric, power in ((True, False), (False, False), (True, True))
]


def correlated(d: int, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, generator=generator) @ torch.randn(d, d, generator=generator) * 0.2
    x[:, 0] *= 30  # an outlier channel, as activations have
    return x.T @ x / tokens


def weight_of(d_out: int, d_in: int, seed: int) -> torch.Tensor:
    return torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed)) * 0.05 + 0.01


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_stay_in_the_grid_and_scales_are_as_stored(name, grid):
    (found,) = QUANTIZERS[name].quantize(
        weight_of(12, 32, 1), [grid], correlated(32, 100, 2), correlated(12, 60, 3), 0.01, torch.bfloat16
    )
    assert found.codes.dtype == torch.int8 and found.codes.shape == (12, 32)
    assert grid.lowest <= found.codes.min() and found.codes.max() <= grid.highest
    assert found.scale.dtype == torch.bfloat16 and found.scale.shape == (12, grid.groups(32))
    assert (found.zero is None) == grid.symmetric
    if grid.power_of_two:
        exponents = torch.log2(found.scale.float().abs())
        assert torch.equal(exponents, exponents.round())
    weight, moment = weight_of(12, 32, 1), correlated(32, 100, 2)
    off = found.dense() - weight
    relative = ((off @ moment * off).sum() / (weight @ moment * weight).sum()).sqrt()
    assert relative < {2: 0.6, 3: 0.3, 4: 0.15, 8: 0.01}[grid.bits]


@pytest.mark.parametrize("spec", [Grid(2, 64, False), Grid(3, 64), Grid(4, 64), Grid(8, 64), Grid(4, 16, True, True)])
def test_a_coarse_search_for_scales_loses_little(monkeypatch, spec):
    """Against trying every step, on weights with heavy tails, as trained ones have."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(256, 512, generator=generator) * (1 + torch.randn(256, 512, generator=generator) ** 2)
    importance = torch.rand(512, generator=generator)

    def error() -> float:
        scale, zero = find_scales(weight, spec, importance, torch.bfloat16)
        codes = round_to(weight.unflatten(1, (scale.shape[1], -1)), scale, zero, spec).flatten(1)
        return float(((values(codes, scale, zero) - weight).square() * importance).sum())

    coarse = error()
    monkeypatch.setattr(grids, "COARSE", 1)
    assert error() <= coarse <= error() * 1.01


@pytest.mark.parametrize("d_out", [16, 64, 576, 1536, 4096, 14336])
def test_a_tall_weight_is_rounded_in_no_more_than_two_dozen_blocks(d_out):
    rows = two_sided.rows_together(d_out)
    assert rows % two_sided.ROWS == 0 and -(-d_out // rows) <= two_sided.BLOCKS
    assert rows == two_sided.ROWS or -(-d_out // rows) > two_sided.BLOCKS / 2


@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_rounding_is_to_the_nearest_level(bits, symmetric, seed):
    grid = Grid(bits, 4, symmetric)
    weight = weight_of(3, 16, seed)
    scale, zero = find_scales(weight, grid, None, torch.float32)
    codes = round_to(weight.unflatten(1, (4, -1)), scale, zero, grid).flatten(1)
    levels = torch.arange(grid.lowest, grid.highest + 1, dtype=torch.int8)
    every = torch.stack([values(torch.full_like(codes, int(level)), scale, zero) for level in levels])
    least = (every - weight).abs().amin(0)
    assert torch.allclose((values(codes, scale, zero) - weight).abs(), least, atol=1e-6)


def test_a_weight_on_the_grid_comes_back_exactly():
    grid = Grid(4, 8)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (6, 16), generator=generator, dtype=torch.int8)
    codes[:, ::8] = -8  # every group uses its whole range
    scale = torch.exp2(torch.randint(-6, 0, (6, 2), generator=generator).float())
    weight = values(codes, scale, None)
    for name in QUANTIZERS:
        (found,) = QUANTIZERS[name].quantize(
            weight, [grid], correlated(16, 64, 3), correlated(6, 64, 4), 0.01, torch.bfloat16
        )
        assert torch.equal(found.dense(), weight), name


def test_importance_moves_the_scale_to_what_counts():
    weight = weight_of(4, 32, 5)
    weight[:, 3] = 1.0  # an outlier that no input excites
    importance = torch.ones(32)
    importance[3] = 0.0
    error = {}
    for name, counted in (("plain", None), ("weighted", importance)):
        scale, zero = find_scales(weight, Grid(3), counted, torch.float32)
        codes = round_to(weight.unflatten(1, (1, -1)), scale, zero, Grid(3)).flatten(1)
        error[name] = float(((values(codes, scale, zero) - weight) * importance).square().sum())
    assert error["weighted"] < 0.6 * error["plain"]


@pytest.mark.parametrize(("exact", "error"), [(EXACT, 1e-6), (0, 1e-3)])  # in float64 throughout, and in float32
@given(size=st.integers(1, 13), seed=st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_inverse_root_is_the_cholesky_factor_of_the_inverse(exact, error, size, seed):
    moment = correlated(size, 40, seed)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(inverse_root.__globals__, "EXACT", exact)
        upper = inverse_root(moment, 0.01, order).double()
    moment = moment.double()[order][:, order]
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    true = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert float((upper - true).abs().max() / true.abs().max()) < error


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [16, 160])  # within a block, and over two
def test_gptq_solves_its_normal_equations(symmetric, width):
    """Fix the columns quantized so far, solve for the free ones directly, round the next: the same codes."""
    grid, damping = Grid(3, 8, symmetric), 0.01
    weight, moment = weight_of(5, width, 7), correlated(width, 3 * width, 8)
    (found,) = gptq(weight, [grid], moment, None, damping, torch.bfloat16)
    damped = moment.double() + damping * moment.double().diagonal().mean() * torch.eye(width, dtype=torch.float64)
    order = moment.diagonal().argsort(descending=True, stable=True).tolist()
    scale, zero = find_scales(weight, grid, moment.diagonal(), torch.bfloat16)
    wanted, quantized = weight.double(), torch.zeros(5, width, dtype=torch.float64)
    differing = 0
    for step, column in enumerate(order):
        fixed, free = order[:step], order[step:]
        change = (wanted[:, fixed] - quantized[:, fixed]) @ damped[fixed][:, free]
        best = wanted[:, free] + torch.linalg.solve(damped[free][:, free], change.T).T
        group = column // 8
        shift = None if zero is None else zero[:, group : group + 1]
        code = round_to(best[:, :1].unsqueeze(1), scale[:, group : group + 1], shift, grid).flatten(1)
        differing += int((code[:, 0] != found.codes[:, column]).sum())
        # go on from what GPTQ chose: a tie that rounds the other way in float32 changes all that follows
        quantized[:, column] = found.dense().double()[:, column]
    assert differing <= 0.005 * weight.numel()


def test_each_quantizer_loses_least_by_what_it_minimises():
    weight, moment, gradient = weight_of(96, 64, 9), correlated(64, 200, 10), correlated(96, 300, 11)
    one_sided, both = {}, {}
    for name, quantizer in QUANTIZERS.items():
        (found,) = quantizer.quantize(weight, [Grid(3, 16)], moment, gradient, 0.01, torch.bfloat16)
        off = found.dense() - weight
        one_sided[name] = float((off @ moment * off).sum())
        both[name] = float((gradient @ off @ moment * off).sum())
    assert one_sided["gptq"] < 0.6 * one_sided["rtn"]
    assert both["two-sided"] < 0.85 * both["gptq"]


def test_two_sided_rounding_is_optimal_row_after_row(monkeypatch):
    """With blocks of one row: fix the rows done, solve for the free ones directly, round the next by GPTQ: the same codes."""
    monkeypatch.setattr(two_sided, "ROWS", 1)
    monkeypatch.setattr(two_sided, "OUTPUT_DAMPING", 0.01)
    grid, damping, rows = Grid(3, 8), 0.01, 6
    weight, moment, gradient = weight_of(rows, 16, 12), correlated(16, 60, 13), correlated(rows, 40, 14)
    (found,) = two_sided.two_sided_rounding(weight, [grid], moment, gradient, damping, torch.bfloat16)
    damped = gradient.double() + 0.01 * gradient.double().diagonal().mean() * torch.eye(rows, dtype=torch.float64)
    order = gradient.diagonal().argsort(descending=True, stable=True).tolist()
    scale, _ = find_scales(weight, grid, moment.diagonal(), torch.bfloat16)
    columns = Columns(moment, damping)
    error = torch.zeros(rows, 16, dtype=torch.float64)
    for step, row in enumerate(order):
        fixed, free = order[:step], order[step:]
        # the free rows of the error that make tr(G E H E^T) least whatever H is
        wanted = -torch.linalg.solve(damped[free][:, free], damped[free][:, fixed] @ error[fixed])
        target = weight[row].double() - wanted[0]
        (codes,) = columns.round([target.float().unsqueeze(0)], [Levels(grid, scale[row : row + 1], None)])
        assert (codes[0] != found.codes[row]).sum() <= 1
        error[row] = weight[row].double() - found.dense()[row].double()


def test_gptq_survives_inputs_that_never_fire():
    moment = torch.zeros(16, 16)
    moment[:4, :4] = correlated(4, 50, 11)
    for second in (moment, torch.zeros(16, 16)):
        (found,) = gptq(weight_of(4, 16, 12), [Grid(4)], second, None, 0.01, torch.float32)
        assert bool(torch.isfinite(found.dense()).all())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_many_grids_at_once_are_each_as_alone(name, monkeypatch):
    weight, moment, gradient = weight_of(80, 32, 15), correlated(32, 100, 16), correlated(80, 200, 17)
    for together in (1, 1 << 25):
        monkeypatch.setattr(two_sided, "TOGETHER", together)
        every = QUANTIZERS[name].quantize(weight, GRIDS, moment, gradient, 0.01, torch.bfloat16)
        for grid, found in zip(GRIDS, every, strict=True):
            (alone,) = QUANTIZERS[name].quantize(weight, [grid], moment, gradient, 0.01, torch.bfloat16)
            assert found.grid == grid and torch.equal(found.scale, alone.scale)
            assert (
                found.codes != alone.codes
            ).float().mean() < 0.01  # products of another shape may round a tie elsewhere


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("numbers", "inside"), [(1, 1), (1 << 30, 2)])
def test_work_side_by_side_keeps_its_order_and_gives_the_threads_back(two_threads, numbers, inside):
    for _ in range(2):
        found = each(lambda number: (number**2, torch.get_num_threads()), range(5), numbers)
        assert found == [(n**2, inside) for n in range(5)]
        assert torch.get_num_threads() == 2


def test_an_error_side_by_side_is_told_when_nothing_goes_on_any_more(two_threads):
    """What is under way is waited for, what has not begun never does, and the next work is done."""
    begun, failed, ended = threading.Event(), threading.Event(), []

    def work(item):
        if item == "fails":
            begun.wait()
            failed.set()
            raise ZeroDivisionError
        begun.set()
        failed.wait()
        time.sleep(0.05)
        ended.append(item)

    with pytest.raises(ZeroDivisionError):
        each(work, ["fails", "goes on", *range(50)], 1)
    assert "goes on" in ended and len(ended) < 50 and torch.get_num_threads() == 2
    so_far = list(ended)
    assert each(abs, [-1, -2], 1) == [1, 2] and ended == so_far


def test_work_side_by_side_starts_no_thread_after_the_first(two_threads):
    """A run under a limit of memory must not: python waits for ever for a thread that could not begin."""
    start()
    names = {thread.ident for thread in threading.enumerate()}
    assert set(each(lambda _: threading.get_ident(), range(20), 1)) <= names
