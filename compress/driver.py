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
from checkpoint.forms import Part, stored_module
from checkpoint.memory import release_memory
from checkpoint.sink import Replacement, write_dense, write_factored
from checkpoint.workdir import WorkDirectory
from compress.allocate import ALLOCATIONS
from compress.methods import METHODS, NATS
from compress.parts import Factors
from compress.pivoting import PART_FORMS
from compress.plan import Plan
from compress.progress import Stage
from compress.sizes import largest_rank, rank_parameters
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
        rank = (
            (plan.ranks[linear.name] or 0)
            if plan.recipe.mode == "sequential"
            else largest_rank(linear, plan.recipe.form)
        )
        if rank < 1:
            continue  # stays dense
        factors = decompose(plan, open_layer, linear, moments.get(linear.local, EMPTY), rank)
        tensors |= {f"{linear.local}.{key}": value for key, value in _record(factors, linear).items()}
        notes[linear.local] = {"seconds": round(time.monotonic() - started, 4)}
    return tensors, notes


Losses = dict[str, torch.Tensor]


def read_losses(plan: Plan, work: WorkDirectory) -> Losses:
    """The recorded losses at every rank, by linear (those that can be factored)."""
    losses: Losses = {}
    for layer in plan.structure.layers:
        record = work.get(stage_name(plan), layer.index, ending=".loss")
        losses |= {linear.name: record[key] for linear in layer.linears if (key := f"{linear.local}.loss") in record}
    return losses


def choose(plan: Plan, losses: Losses) -> Plan:
    """The plan with its final ranks: where the allocation reads losses, they are known now."""
    if not ALLOCATIONS[plan.recipe.allocation].reads_losses:
        return plan
    return plan.with_ranks({name: tuple(loss.tolist()) for name, loss in losses.items()})


def loss_at(plan: Plan, losses: Losses, linear: Linear) -> float:
    """The method's loss of a linear at its planned rank, in its own unit."""
    rank = plan.ranks[linear.name]
    return 0.0 if rank is None else float(losses[linear.name][rank])


def predicted_loss(plan: Plan, losses: Losses) -> float | None:
    """Predicted KL(dense || compressed) in nats per token; None where the method's losses are in another unit."""
    if METHODS[plan.recipe.decomposition].unit != NATS:
        return None
    return sum(loss_at(plan, losses, linear) for linear in plan.structure.linears)


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
                install(plan, open_layer, linear, _part(plan, tensors, linear, rank))
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


def install(plan: Plan, open_layer: OpenLayer, linear: Linear, part: Part) -> None:
    """Put a compressed part in the place of its linear, as the checkpoint will hold it."""
    original = open_layer.linear(linear.local)
    bias: torch.Tensor | None = original.bias if linear.has_bias else None  # type: ignore[assignment]
    if plan.recipe.export == "dense":
        module: torch.nn.Module = torch.nn.Linear(linear.d_in, linear.d_out, bias=linear.has_bias, device="meta")
        state = {"weight": part.dense().to(plan.source.compute_dtype)}
        module.load_state_dict(state if bias is None else {**state, "bias": bias.detach()}, assign=True)
        module.requires_grad_(False)
    else:
        module = stored_module(part, bias, plan.source.compute_dtype)
    open_layer.install(linear.local, module)


def _record(factors: Factors, linear: Linear) -> dict[str, torch.Tensor]:
    """Factors in the dtype in which they will be stored, the losses as they are."""
    return {"a": factors.a.to(linear.dtype), "b": factors.b.to(linear.dtype), "loss": factors.loss}


def _part(plan: Plan, tensors: Mapping[str, torch.Tensor], linear: Linear, rank: int) -> Part:
    a, b, loss = (tensors[f"{linear.local}.{key}"] for key in ("a", "b", "loss"))
    return PART_FORMS[plan.recipe.form](Factors(a, b, loss).at_rank(rank))


class Parts:
    """The recorded parts of a plan, one layer's record in memory at a time."""

    def __init__(self, plan: Plan, work: WorkDirectory) -> None:
        self._plan, self._work = plan, work
        self._index, self._tensors = -1, dict[str, torch.Tensor]()

    def part(self, linear: Linear) -> Part | None:
        """The linear's part at its planned rank; None where it stays dense."""
        rank = self._plan.ranks[linear.name]
        if rank is None:
            return None
        if linear.layer != self._index:
            self._tensors = self._work.get(stage_name(self._plan), linear.layer)
            self._index = linear.layer
        return _part(self._plan, self._tensors, linear, rank)


def write(plan: Plan, work: WorkDirectory, directory: Path) -> tuple[Stage, int]:
    """Write the compressed checkpoint into ``directory``; returns the stage and the bytes of tensors."""
    parts = Parts(plan, work)
    factored = [linear for linear in plan.structure.linears if plan.ranks[linear.name] is not None]
    with Stage("writing", len(factored), "matrices") as stage:

        def replacement(linear: Linear) -> Replacement:
            def due() -> Part:
                part = parts.part(linear)
                assert part is not None
                stage.step()
                return part

            return Replacement(plan.recipe.form, plan.ranks[linear.name] or 0, linear.transposed, due)

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


def matrix_rows(plan: Plan, work: WorkDirectory, losses: Losses) -> list[dict[str, Any]]:
    """One row per linear for the CSV: rank, kept parameters, relative error ``(loss / loss of dropping all)^0.5``, seconds."""
    rows = []
    for layer in plan.structure.layers:
        notes = work.notes(stage_name(plan), layer.index)
        for linear in layer.linears:
            rank = plan.ranks[linear.name]
            parameters = rank_parameters(linear, plan.recipe.form, rank)
            loss = loss_at(plan, losses, linear)
            whole = 0.0 if rank is None else float(losses[linear.name][0])
            rows.append(
                {
                    "layer": layer.index,
                    "matrix": linear.local,
                    "d_out": linear.d_out,
                    "d_in": linear.d_in,
                    "rank": "dense" if rank is None else rank,
                    "parameters": parameters,
                    "kept": round(parameters / (linear.d_out * linear.d_in), 4),
                    "relative_error": round((loss / whole) ** 0.5, 6) if whole > 0 else 0.0,
                    "loss": float(f"{loss:.6g}"),
                    "seconds": notes.get(linear.local, {}).get("seconds", 0.0),
                }
            )
    return rows
