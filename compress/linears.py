"""What one linear of an open layer may become, as the plan's recipe has it: the mathematics, with names for what goes wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from calibration.moments import Moments, module_weight
from calibration.replay import OpenLayer
from calibration.structure import Linear
from checkpoint.errors import UserError
from checkpoint.forms import Grid
from checkpoint.memory import release_memory
from checkpoint.workdir import WorkDirectory
from compress.allocations import ALLOCATIONS, Curve
from compress.allocations.pooled import lower_hull
from compress.candidates import Candidate, quantized_product_losses
from compress.counts import count, counted
from compress.methods import METHODS
from compress.parallel import FEW, each
from compress.parts import Factors
from compress.plan import Plan
from compress.records import candidate_record, from_record, to_record
from compress.truncation import NotFinite

Result = TypeVar("Result")
EMPTY = Moments(tokens=0, input_power=0.0)
BORROWED = "matrices of experts that saw too few tokens, compressed by their layer's moments"


def whole_menu(
    plan: Plan, open_layer: OpenLayer, linears: Iterable[Linear], moments: dict[str, Moments], work: WorkDirectory
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Records and notes of the linears that have a menu: everything on it that an allocation may choose, and its loss.

    A linear's ``moments`` are taken out when it is its turn, and need not stay in memory: the largest linear's are the first. Its
    record is put aside, for a layer's records are larger than the layer.
    """
    tensors: dict[str, torch.Tensor] = {}
    notes: dict[str, Any] = {}
    with_menu = [linear for linear in linears if plan.recipe.storage.menu(linear)]  # the others stay dense

    def record(linear: Linear) -> dict[str, torch.Tensor]:
        _release(linear)  # the heap that the last linear left
        with noted(notes, linear):
            return work.aside(linear.local, _menu_of(plan, open_layer, linear, moments.pop(linear.local, EMPTY)))

    release_memory()  # the heap that the layer's activations left
    for of_linear in side_by_side(record, with_menu):
        tensors |= of_linear
    return tensors, notes


def side_by_side(function: Callable[[Linear], Result], linears: Iterable[Linear]) -> list[Result]:
    """``function`` of every linear, the largest first; of small ones as many at a time as there are threads.

    How many threads a linear has is a matter of its own size: whoever else is in its round (--memory-limit), its numbers are the same.
    """
    waiting = sorted(linears, key=_size, reverse=True)
    large = [function(linear) for linear in waiting if _size(linear) > FEW]
    return large + each(function, [linear for linear in waiting if _size(linear) <= FEW], 0)


def _size(linear: Linear) -> int:
    return linear.d_out * linear.d_in


def _release(linear: Linear) -> None:
    """Free pages back to the system; of a small linear there are few, and to have them again would take as long as its work."""
    if _size(linear) > FEW:
        release_memory()


@contextmanager
def noted(notes: dict[str, Any], linear: Linear) -> Iterator[None]:
    """Note how long a linear took, and what had to be mended in its numbers."""
    started = time.monotonic()
    with counted() as mended:
        yield
    notes[linear.local] = {"seconds": round(time.monotonic() - started, 4), "mended": dict(mended)}


def _menu_of(plan: Plan, open_layer: OpenLayer, linear: Linear, of_linear: Moments) -> dict[str, torch.Tensor]:
    """The record of one linear."""
    tensors: dict[str, torch.Tensor] = {}
    storage, menu = plan.recipe.storage, plan.recipe.storage.menu(linear)
    count(BORROWED, of_linear.borrowed)
    loss = torch.full((len(menu) + 1,), torch.inf, dtype=torch.float64)
    if storage.low_rank:
        factors = decompose(plan, open_layer, linear, of_linear, storage.largest_rank(linear))
        tensors |= to_record(factors, linear)
        loss[0] = factors.loss[0]
        in_dtype = [choice for choice, spec in enumerate(menu, 1) if spec.weight is None and spec.factors is None]
        loss[in_dtype] = factors.loss[[menu[choice - 1].rank for choice in in_dtype]].cpu()
        del factors  # float64 along all directions, which the record does not need
        on_grids = {choice: spec for choice, spec in enumerate(menu, 1) if spec.weight is None and spec.factors}
        if on_grids:
            _release(linear)  # between the steps: what one left and what the next takes would be in memory together
            weight = module_weight(open_layer.linear(linear.local)).double()
            stored = from_record(tensors, linear).at_rank(max(spec.rank for spec in on_grids.values()))
            loss[list(on_grids)] = quantized_product_losses(weight, stored, on_grids.values(), of_linear).cpu()
            del weight, stored
    if storage.grids:
        _release(linear)
        tensors |= _quantized_menu(plan, open_layer, linear, of_linear, loss)
        if not storage.low_rank:
            loss[0] = loss_of_all(plan, open_layer, linear, of_linear)
    tensors[f"{linear.local}.loss"] = loss
    if "spectrum" in ALLOCATIONS[plan.recipe.allocation].reads:
        weight = module_weight(open_layer.linear(linear.local)).double()
        tensors[f"{linear.local}.spectrum"] = torch.linalg.svdvals(weight).cpu()
    return tensors


def _quantized_menu(
    plan: Plan, open_layer: OpenLayer, linear: Linear, moments: Moments, loss: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Records of the packed candidates of a linear; their losses go into ``loss``, by choice."""
    menu = plan.recipe.storage.menu(linear)
    ranks = {grid: max(spec.rank for spec in menu if spec.weight == grid) for grid in {s.weight for s in menu} if grid}
    candidates = quantize(plan, open_layer, linear, moments, ranks)
    found = {item.weight.grid: (item.loss, candidate_record(item, linear)) for item in candidates}
    return kept_candidates(plan, linear, found, loss)


def kept_candidates(
    plan: Plan,
    linear: Linear,
    found: Mapping[Grid, tuple[torch.Tensor, dict[str, torch.Tensor]]],
    loss: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Records of packed candidates; ``found`` has the losses by rank and the record of every grid on the menu.

    The losses go into ``loss``, by choice. Where losses decide, candidates that no budget would choose are not kept: their losses
    are infinite again.
    """
    storage = plan.recipe.storage
    menu = storage.menu(linear)
    for choice, spec in enumerate(menu, 1):
        if spec.weight is not None:
            loss[choice] = found[spec.weight][0][spec.rank]
    kept = set(found)
    if ALLOCATIONS[plan.recipe.allocation].reads:
        curve = Curve(linear.nbytes, storage.sizes(linear), tuple(loss.tolist()))
        kept = {grid for point in lower_hull(curve) if point.choice and (grid := menu[point.choice - 1].weight)}
        for choice, spec in enumerate(menu, 1):
            if spec.weight is not None and spec.weight not in kept:
                loss[choice] = torch.inf
    return {name: tensor for grid in found if grid in kept for name, tensor in found[grid][1].items()}


def loss_of_all(plan: Plan, open_layer: OpenLayer, linear: Linear, moments: Moments) -> float:
    """The objective of quantization when nothing is left of a linear."""
    weight = module_weight(open_layer.linear(linear.local)).double()
    with _named(linear):
        return plan.recipe.quantization.loss_of_all(weight, moments)


def quantize(
    plan: Plan, open_layer: OpenLayer, linear: Linear, moments: Moments, ranks: Mapping[Grid, int]
) -> list[Candidate]:
    """One linear on grids with corrections of at most so many ranks (UserError naming it where numbers are not finite)."""
    weight = module_weight(open_layer.linear(linear.local)).double()
    with _named(linear):
        return plan.recipe.quantization.candidates(weight, ranks, moments, linear.dtype)


def decompose(plan: Plan, open_layer: OpenLayer, linear: Linear, moments: Moments, rank: int) -> Factors:
    """Run the recipe's decomposition on one linear (UserError naming it where numbers are not finite)."""
    weight = module_weight(open_layer.linear(linear.local)).double()
    method = METHODS[plan.recipe.decomposition]
    run = method.decompose
    assert run is not None
    if method.without_bias and not (linear.has_bias or plan.recipe.storage.adds_bias):
        run = method.without_bias
    with _named(linear):
        return run(weight, moments, rank, plan.recipe.damping)


@contextmanager
def _named(linear: Linear) -> Iterator[None]:
    """UserError naming the linear where its numbers are not finite."""
    try:
        yield
    except (NotFinite, torch.linalg.LinAlgError) as problem:
        raise UserError(f"{linear.name}: {problem}; its activations overflow, try --dtype float32") from problem
