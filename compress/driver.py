"""The one driver that joins the rooms: collect -> choose -> write, or one sequential walk.

Both modes leave the same records in the work directory: ordered factors per linear. One-shot keeps every rank
up to the break-even one, so that any ratio is a slice; the sequential walk keeps just the ranks that it installed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from calibration.moments import Moments, module_weight
from calibration.structure import Group, Layer, Linear
from calibration.sweep import OpenLayer, Sweep, opened, streamed_logits
from calibration.windows import Windows
from checkpoint.errors import UserError
from checkpoint.memory import release_memory
from checkpoint.sink import Replacement, factored_module, write_dense, write_factored
from checkpoint.workdir import WorkDirectory
from compress.allocate import ALLOCATIONS
from compress.methods import METHODS, NATS
from compress.parts import Factors, LowRank
from compress.plan import Plan
from compress.progress import Stage
from compress.truncation import NotFinite

EMPTY = Moments(tokens=0, input_power=0.0)


def stage_name(plan: Plan) -> str:
    """Where a plan's factors are recorded: sequential factors belong to one choice of ranks."""
    return "factors" if plan.recipe.mode == "one-shot" else f"factors-{plan.recipe.ratio_scope}-{plan.ratio:g}"


def collect(plan: Plan, windows: Windows | None, work: WorkDirectory) -> list[Stage]:
    """Decompose every linear, layer by layer, skipping the layers that are recorded already."""
    if "gradient" in METHODS[plan.recipe.decomposition].needs:
        assert windows is not None
        return _collect_backward(plan, windows, work)
    layers = plan.structure.layers
    stage_key = stage_name(plan)
    done = next((index for index in range(len(layers)) if not work.done(stage_key, index)), len(layers))
    sweep = None
    if windows is not None:
        sweep = Sweep(plan.source, plan.structure, windows, work.path / f"hidden-{stage_key}", plan.recipe.micro_batch)
    with Stage("decomposing", len(layers)) as stage:
        if done:
            stage.step(done)
        if sweep and done < len(layers):
            sweep.embed()
        for layer in layers[done:]:
            with opened(plan.source, layer) as open_layer:
                tensors, notes = _decompose_layer(plan, open_layer, sweep)
            work.put(stage_key, layer.index, tensors, notes)
            if sweep:
                sweep.forget(layer.index)
            stage.step()
        if sweep:
            sweep.close()
    return [stage]


def _collect_backward(plan: Plan, windows: Windows, work: WorkDirectory) -> list[Stage]:
    """Forward once, keeping every layer's input; then from the last layer to the first under autograd, decomposing."""
    layers, recipe, stage_key = plan.structure.layers, plan.recipe, stage_name(plan)
    sweep = Sweep(plan.source, plan.structure, windows, work.path / f"hidden-{stage_key}", recipe.micro_batch)
    waiting = [layer for layer in reversed(layers) if not work.done(stage_key, layer.index)]
    with Stage("forward", len(layers)) as forward:
        if len(waiting) == len(layers):
            sweep.embed()
            for layer in layers:
                if not sweep.path(layer.index + 1).exists():
                    with opened(plan.source, layer) as open_layer:
                        sweep.advance(open_layer)
                forward.step()
        else:  # some layers were recorded: the forward pass was complete then
            forward.step(len(layers))
    with Stage("loss gradient", 1, "head") as head:
        if len(waiting) == len(layers):
            sweep.start_backward(recipe.gradient_windows, recipe.fisher, recipe.seed)
        head.step()
    with Stage("backward", len(layers)) as backward:
        backward.step(len(layers) - len(waiting))
        for layer in waiting:
            with opened(plan.source, layer) as open_layer:
                needs = METHODS[recipe.decomposition].needs
                moments = sweep.collect_backward(open_layer, needs, recipe.gradient_windows)
                tensors, notes = _decompose_linears(plan, open_layer, layer.linears, moments)
            work.put(stage_key, layer.index, tensors, notes)
            sweep.forget(layer.index + 1)
            backward.step()
        sweep.close()
    return [forward, head, backward]


def _decompose_linears(
    plan: Plan, open_layer: OpenLayer, linears: Iterable[Linear], moments: Mapping[str, Moments]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Records and notes of the linears that can be factored, at the plan's ranks or (one-shot) at every rank that saves."""
    tensors: dict[str, torch.Tensor] = {}
    notes: dict[str, Any] = {}
    release_memory()  # the heap that the layer's activations left, before float64 work comes on top
    for linear in linears:
        started = time.monotonic()
        rank = (plan.ranks[linear.name] or 0) if plan.recipe.mode == "sequential" else linear.largest_rank
        if rank < 1:
            continue  # stays dense
        factors = decompose(plan, open_layer, linear, moments.get(linear.local, EMPTY), rank)
        tensors |= {f"{linear.local}.{key}": value for key, value in _record(factors, linear).items()}
        notes[linear.local] = {"seconds": round(time.monotonic() - started, 4)}
    return tensors, notes


def choose(plan: Plan, work: WorkDirectory) -> Plan:
    """The plan with its final ranks: where the allocation reads losses, they are in the records now."""
    if not ALLOCATIONS[plan.recipe.allocation].reads_losses:
        return plan
    losses: dict[str, tuple[float, ...]] = {}
    for layer in plan.structure.layers:
        record = work.get(stage_name(plan), layer.index)
        for linear in layer.linears:
            if linear.largest_rank >= 1:
                losses[linear.name] = tuple(record[f"{linear.local}.loss"].tolist())
    return plan.with_ranks(losses)


def predicted_loss(plan: Plan, work: WorkDirectory) -> float | None:
    """Predicted KL(dense || compressed) in nats per token; None where the method's losses are in another unit."""
    if METHODS[plan.recipe.decomposition].unit != NATS:
        return None
    parts = Parts(plan, work)
    return sum(parts.loss(linear) for linear in plan.structure.linears)


def _decompose_layer(
    plan: Plan, open_layer: OpenLayer, sweep: Sweep | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    layer = open_layer.layer
    needs = METHODS[plan.recipe.decomposition].needs
    last = layer.index == len(plan.structure.layers) - 1
    sequential = plan.recipe.mode == "sequential"
    tensors: dict[str, torch.Tensor] = {}
    notes: dict[str, Any] = {}
    rounds: Iterable[tuple[Group, ...]] = [(group,) for group in layer.groups] if sequential else [layer.groups]
    for groups in rounds:
        moments = sweep.collect(open_layer, groups, needs, advance=not sequential and not last) if sweep else {}
        linears = [item for group in groups for item in group.linears]
        found, told = _decompose_linears(plan, open_layer, linears, moments)
        tensors |= found
        notes |= told
        for linear in linears if sequential else []:
            rank = plan.ranks[linear.name]
            if rank is not None:
                install(plan, open_layer, linear, _slice(tensors, linear, rank))
    if sequential and sweep and not last:
        sweep.advance(open_layer)
    return tensors, notes


def decompose(plan: Plan, open_layer: OpenLayer, linear: Linear, moments: Moments, rank: int) -> Factors:
    """Run the recipe's decomposition on one linear (UserError naming it where numbers are not finite)."""
    weight = module_weight(open_layer.linear(linear.local)).double()
    try:
        return METHODS[plan.recipe.decomposition].decompose(weight, moments, rank, plan.recipe.damping)
    except (NotFinite, torch.linalg.LinAlgError) as problem:
        raise UserError(f"{linear.name}: {problem}; its activations overflow, try --dtype float32") from problem


def install(plan: Plan, open_layer: OpenLayer, linear: Linear, part: LowRank) -> None:
    """Put a compressed part in the place of its linear, as the checkpoint will hold it."""
    original = open_layer.linear(linear.local)
    a, b = part.a, part.b
    if plan.recipe.export == "dense":
        module: torch.nn.Module = torch.nn.Linear(linear.d_in, linear.d_out, bias=linear.has_bias, device="meta")
        module.weight = torch.nn.Parameter(part.dense().to(plan.source.compute_dtype), requires_grad=False)
        if linear.has_bias:
            module.bias = original.bias
    else:
        module = factored_module(a, b, original.bias, plan.source.compute_dtype)  # type: ignore[arg-type]
    open_layer.install(linear.local, module)


def _record(factors: Factors, linear: Linear) -> dict[str, torch.Tensor]:
    """Factors in the dtype in which they will be stored, the losses as they are."""
    return {"a": factors.a.to(linear.dtype), "b": factors.b.to(linear.dtype), "loss": factors.loss}


def _slice(tensors: dict[str, torch.Tensor], linear: Linear, rank: int) -> LowRank:
    a, b, loss = (tensors[f"{linear.local}.{key}"] for key in ("a", "b", "loss"))
    return Factors(a, b, loss).at_rank(rank)


class Parts:
    """The recorded parts of a plan, one layer's record in memory at a time."""

    def __init__(self, plan: Plan, work: WorkDirectory) -> None:
        self._plan, self._work = plan, work
        self._index, self._tensors = -1, dict[str, torch.Tensor]()

    def part(self, linear: Linear) -> LowRank | None:
        """The linear's factors at its planned rank; None where it stays dense."""
        rank = self._plan.ranks[linear.name]
        return None if rank is None else _slice(self._layer(linear.layer), linear, rank)

    def loss(self, linear: Linear) -> float:
        """The method's loss at the planned rank, in its own unit."""
        rank = self._plan.ranks[linear.name]
        return 0.0 if rank is None else float(self._layer(linear.layer)[f"{linear.local}.loss"][rank])

    def error(self, linear: Linear) -> float:
        """The method's relative error, ``(loss at the rank / loss of dropping all)^0.5``."""
        rank = self._plan.ranks[linear.name]
        if rank is None:
            return 0.0
        loss = self._layer(linear.layer)[f"{linear.local}.loss"]
        return float((loss[rank] / loss[0]).sqrt()) if loss[0] > 0 else 0.0

    def _layer(self, index: int) -> dict[str, torch.Tensor]:
        if index != self._index:
            self._tensors = self._work.get(stage_name(self._plan), index)
            self._index = index
        return self._tensors


def write(plan: Plan, work: WorkDirectory, directory: Path) -> tuple[Stage, int]:
    """Write the compressed checkpoint into ``directory``; returns the stage and the bytes of tensors."""
    parts = Parts(plan, work)
    factored = [linear for linear in plan.structure.linears if plan.ranks[linear.name] is not None]
    written: set[str] = set()
    with Stage("writing", len(factored), "matrices") as stage:

        def replacement(linear: Linear) -> Replacement:
            def factors() -> tuple[torch.Tensor, torch.Tensor]:
                part = parts.part(linear)
                assert part is not None
                if linear.name not in written:
                    written.add(linear.name)
                    stage.step()
                return part.a, part.b

            return Replacement(plan.ranks[linear.name] or 0, linear.transposed, factors)

        replaced = {linear.name: replacement(linear) for linear in factored}
        if plan.recipe.export == "dense":
            total = write_dense(plan.source, replaced, directory)
        else:
            total = write_factored(plan.source, [layer.path for layer in plan.structure.layers], replaced, directory)
    if plan.recipe.export == "factored" and total != plan.sizes.bytes_after:
        raise RuntimeError(f"wrote {total} bytes of tensors where the plan said {plan.sizes.bytes_after}")
    return stage, total


def expected_logits(plan: Plan, work: WorkDirectory, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the compressed model for a few windows of ids, one layer in memory."""
    parts = Parts(plan, work)

    def prepare(open_layer: OpenLayer) -> None:
        layer: Layer = open_layer.layer
        for linear in layer.linears:
            part = parts.part(linear)
            if part is not None:
                install(plan, open_layer, linear, part)

    return streamed_logits(plan.source, plan.structure, ids, prepare)


def matrix_rows(plan: Plan, work: WorkDirectory) -> list[dict[str, Any]]:
    """One row per linear for the CSV: rank, kept parameters, relative error, seconds."""
    parts = Parts(plan, work)
    rows = []
    for layer in plan.structure.layers:
        notes = work.notes(stage_name(plan), layer.index)
        for linear in layer.linears:
            rank = plan.ranks[linear.name]
            dense = linear.d_out * linear.d_in
            rows.append(
                {
                    "layer": layer.index,
                    "matrix": linear.local,
                    "d_out": linear.d_out,
                    "d_in": linear.d_in,
                    "rank": "dense" if rank is None else rank,
                    "parameters": dense if rank is None else rank * (linear.d_out + linear.d_in),
                    "kept": round(1.0 if rank is None else rank * (linear.d_out + linear.d_in) / dense, 4),
                    "relative_error": round(parts.error(linear), 6),
                    "loss": float(f"{parts.loss(linear):.6g}"),
                    "seconds": notes.get(linear.local, {}).get("seconds", 0.0),
                }
            )
    return rows
