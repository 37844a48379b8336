"""The one driver that joins the rooms: statistics are collected and every linear is decomposed, layer by layer.

Three ways through the model, each durable after every layer: forward (one-shot, from the dense model's inputs), backward (where
the loss gradient is needed), and a walk that installs what it compressed, so that later groups of the same layer and all
later layers see it.

Several processes (checkpoint/processes.py) share a layer twice: each runs some windows through it, and, when the moments are
added up, each decomposes some of its matrices. The main one records what all have found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from calibration.finished import Finished
from calibration.moments import Moments, module_weight
from calibration.replay import OpenLayer, opened
from calibration.roles import CONSUMER, PRODUCERS
from calibration.structure import Group, Linear
from calibration.sweep import Sweep
from calibration.windows import Windows
from checkpoint import processes
from checkpoint.memory import release_memory
from checkpoint.progress import Stage
from checkpoint.workdir import WorkDirectory
from compress.allocations import ALLOCATIONS
from compress.counts import count
from compress.ends import end_menus
from compress.footprint import in_passes
from compress.install import install
from compress.linears import BORROWED, EMPTY, decompose, loss_of_all, noted, quantize, side_by_side, whole_menu
from compress.methods.channels import channel_scores, kept_channels
from compress.parts import Channels, Factors
from compress.plan import Plan
from compress.records import DENSE_STAGE, candidate_record, from_record, part_of, read_collected, stage_name, to_record
from compress.refit import refit
from compress.search import search
from compress.sizes import Collected

NOT_REFITTED = "matrices of experts that were not refitted"


def collect(plan: Plan, windows: Windows | None, work: WorkDirectory) -> tuple[Plan, Collected, list[Stage]]:
    """Record what every linear may become, skipping the layers that are recorded already; the plan with its final choices.

    A sequential walk whose allocation reads losses or spectra is preceded by a sweep over the dense model for them.
    """
    tokens = windows.tokens if windows else 1
    reads = bool(ALLOCATIONS[plan.recipe.allocation].reads)
    stages: list[Stage] = []
    if plan.recipe.mode == "one-shot" or reads:
        needs = plan.recipe.needs
        through = _backward if plan.recipe.backward else _influence if "influence" in needs else _forward
        stages += through(plan, windows, work)
        if "sensitivity" in ALLOCATIONS[plan.recipe.allocation].reads:
            assert windows is not None
            stages.append(search(plan, windows, work))
        collected = processes.of_main(lambda: read_collected(plan, work, DENSE_STAGE, tokens))
        if reads:
            plan = plan.with_choices(collected)
    if plan.recipe.walks:
        stages.append(_walk(plan, windows, work))
        walked = plan
        collected = processes.of_main(lambda: read_collected(walked, work, stage_name(walked), tokens))
    return plan, collected, stages


def _add_menus(
    plan: Plan,
    open_layer: OpenLayer,
    linears: Sequence[Linear],
    moments: dict[str, Moments],
    work: WorkDirectory,
    tensors: dict[str, torch.Tensor],
    notes: dict[str, Any],
) -> None:
    """Add what some linears of a layer may become to its record; their ``moments`` are used up."""
    own = _own_linears(linears)
    for other in moments.keys() - {linear.local for linear in own}:
        del moments[other]
    more = whole_menu(plan, open_layer, own, moments, work)
    tensors |= processes.united(more[0])
    notes |= processes.notes_of_all(more[1])


def _own_linears(linears: Iterable[Linear]) -> list[Linear]:
    """Those that this process decomposes: a decomposition's work grows with the cube of the smaller side."""
    return processes.own_share(list(linears), lambda item: item.d_out * item.d_in * min(item.d_out, item.d_in))


def _record(
    work: WorkDirectory, stage: str, index: int, tensors: dict[str, torch.Tensor], notes: Mapping[str, Any]
) -> None:
    """Record a layer: the main process does. When this returns all may forget what the layer was made from."""
    if processes.is_main():
        work.put(stage, index, tensors, notes)
    processes.wait()


def _sweep(plan: Plan, windows: Windows, work: WorkDirectory, name: str, backward: int | None = None) -> Sweep:
    directory = work.path / f"hidden-{name}"
    return Sweep(plan.source, plan.structure, windows, directory, plan.recipe.micro_batch, backward)


def _forward(plan: Plan, windows: Windows | None, work: WorkDirectory) -> list[Stage]:
    """Make every linear's menu from the statistics of the dense model's inputs (or without any text)."""
    layers = plan.structure.layers
    done = processes.of_main(lambda: work.leading(DENSE_STAGE, len(layers)))
    sweep = _sweep(plan, windows, work, DENSE_STAGE) if windows else None
    with Stage("decomposing", len(layers)) as stage:
        stage.step(done)
        if sweep and done < len(layers):
            sweep.embed()
        for layer in layers[done:]:
            with opened(plan.source, layer) as open_layer:
                tensors, notes = dict[str, torch.Tensor](), dict[str, Any]()
                runs = in_passes(layer, plan.recipe, plan.passes)
                for linears in runs:
                    moments: dict[str, Moments] = {}
                    if sweep:
                        ends = linears is runs[-1] and layer is not layers[-1]
                        moments = sweep.collect(open_layer, linears, plan.recipe.needs, advance=ends)
                    _add_menus(plan, open_layer, linears, moments, work, tensors, notes)
            _record(work, DENSE_STAGE, layer.index, tensors, notes)
            del moments, tensors  # before the next layer's are collected
            if sweep:
                sweep.forget(layer.index)
            stage.step()
        if sweep:
            sweep.close()
    return [stage]


def _influence(plan: Plan, windows: Windows | None, work: WorkDirectory) -> list[Stage]:
    """How much every layer turns the hidden states; nothing is decomposed."""
    assert windows is not None
    layers = plan.structure.layers
    done = processes.of_main(lambda: work.leading(DENSE_STAGE, len(layers)))
    sweep = _sweep(plan, windows, work, DENSE_STAGE)
    with Stage("block influence", len(layers)) as stage:
        stage.step(done)
        if done < len(layers):
            sweep.embed()
        for layer in layers[done:]:
            with opened(plan.source, layer) as open_layer:
                sweep.advance(open_layer)
            _record(work, DENSE_STAGE, layer.index, {"influence": torch.tensor(sweep.turning(layer.index))}, {})
            sweep.forget(layer.index)
            stage.step()
        sweep.close()
    return [stage]


def _backward(plan: Plan, windows: Windows | None, work: WorkDirectory) -> list[Stage]:
    """Forward once, keeping every layer's input; then from the last layer to the first under autograd, decomposing."""
    assert windows is not None
    layers, recipe = plan.structure.layers, plan.recipe
    sweep = _sweep(plan, windows, work, DENSE_STAGE, recipe.gradient_windows)
    recorded = processes.of_main(lambda: {layer.index for layer in layers if work.done(DENSE_STAGE, layer.index)})
    waiting = [layer for layer in reversed(layers) if layer.index not in recorded]
    with Stage("forward", len(layers)) as forward:
        if len(waiting) == len(layers):
            sweep.embed()
            for layer in layers:
                if not sweep.path(layer.index + 1).exists():
                    with opened(plan.source, layer) as open_layer:
                        rounds = in_passes(layer, recipe, plan.passes)
                        sweep.advance_and_sum(open_layer, rounds, recipe.needs)
                forward.step()
        else:  # some layers were recorded: the forward pass was complete then
            forward.step(len(layers))
    with Stage("loss gradient", 1, "head") as head:
        if len(waiting) == len(layers):
            sweep.start_backward(recipe.fisher, recipe.seed)
        head.step()
    with Stage("backward", len(layers)) as backward:
        backward.step(len(layers) - len(waiting))
        for layer in waiting:
            with opened(plan.source, layer) as open_layer:
                tensors, notes = dict[str, torch.Tensor](), dict[str, Any]()
                for linears in in_passes(layer, recipe, plan.passes):
                    moments = sweep.collect_backward(open_layer, linears, recipe.needs)
                    _add_menus(plan, open_layer, linears, moments, work, tensors, notes)
            _record(work, DENSE_STAGE, layer.index, tensors, notes)
            del moments, tensors  # before the next layer's are collected
            if layer is not layers[-1] or not recipe.packs_ends:  # the head's menu needs what it sees
                sweep.forget(layer.index + 1)
            backward.step()
    stages = [forward, head, backward]
    if recipe.packs_ends:
        with Stage("ends", 1, "embedding and head") as ends:
            if not processes.of_main(lambda: work.done(DENSE_STAGE, len(layers))):
                _record(work, DENSE_STAGE, len(layers), *end_menus(plan, sweep))
            ends.step()
        stages.append(ends)
    sweep.close()
    return stages


def _walk(plan: Plan, windows: Windows | None, work: WorkDirectory) -> Stage:
    """Compress group after group as the plan says, each seeing what was compressed before it."""
    assert windows is not None
    layers, name = plan.structure.layers, stage_name(plan)
    done = processes.of_main(lambda: work.leading(name, len(layers)))
    sweep = _sweep(plan, windows, work, name)
    dense = _sweep(plan, windows, work, f"dense-{name}") if plan.recipe.refit == "anchored" else None
    sweeps = [item for item in (sweep, dense) if item]
    with Stage("walking", len(layers)) as stage:
        stage.step(done)
        for item in sweeps if done < len(layers) else []:
            item.embed()
        for layer in layers[done:]:
            with opened(plan.source, layer) as open_layer:
                tensors: dict[str, torch.Tensor] = {}
                notes: dict[str, Any] = {}
                ready = work.get(DENSE_STAGE, layer.index) if plan.recipe.mode == "one-shot" else None
                rounds = [layer.groups] if plan.recipe.mode == "layerwise" else [(group,) for group in layer.groups]
                with sweep.finished(open_layer) as finished:
                    for groups in rounds:
                        tensors |= _walk_groups(plan, open_layer, groups, ready, (sweep, dense), finished, notes)
                        finished.has(linear.local for group in groups for linear in group.linears)
                    if layer is not layers[-1]:
                        with finished.passing():
                            sweep.advance(open_layer)
                if dense and layer is not layers[-1]:
                    open_layer.restore()
                    dense.advance(open_layer)
            _record(work, name, layer.index, tensors, notes)
            for item in sweeps:
                item.forget(layer.index)
            stage.step()
        for item in sweeps:
            item.close()
    return stage


def _walk_groups(
    plan: Plan,
    open_layer: OpenLayer,
    groups: Sequence[Group],
    ready: Mapping[str, torch.Tensor] | None,
    sweeps: tuple[Sweep, Sweep | None],
    finished: Finished,
    notes: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """Records of the groups' linears as planned (new, or ``ready`` from the dense statistics), refitted; installed."""
    recipe = plan.recipe
    planned = {item: plan.spec(item) for group in groups for item in group.linears}
    linears = {linear: spec for linear, spec in planned.items() if spec is not None}
    if not linears:
        return {}
    moments: Mapping[str, Moments] = {}
    kept: torch.Tensor | None = None
    if ready is None:
        pruning = any(recipe.storage.prunes(linear) for linear in linears)
        needs = recipe.needs | ({"mean_square"} if pruning else set())
        every = [linear for group in groups for linear in group.linears]
        with finished.passing():
            moments = sweeps[0].collect(open_layer, every, needs, advance=False)
        release_memory()
        kept = _kept_channels(plan, open_layer, moments) if pruning else None
    own = linears if ready is not None else _own_linears(linears)
    found: dict[str, Factors | Channels] = {}
    tensors: dict[str, torch.Tensor] = {}
    own_notes: dict[str, Any] = {}

    def compress(linear: Linear) -> None:
        spec, channels = linears[linear], kept if recipe.storage.prunes(linear) else None
        with noted(own_notes, linear):
            count(BORROWED, moments.get(linear.local, EMPTY).borrowed)
            count(NOT_REFITTED, bool(linear.mixture) and recipe.refit != "none")
            if channels is not None:
                found[linear.local] = _pruned(plan, open_layer, linear, channels)
            elif spec.weight is not None:
                of_linear = moments.get(linear.local, EMPTY)
                (candidate,) = quantize(plan, open_layer, linear, of_linear, {spec.weight: spec.rank})
                loss = torch.full((len(recipe.storage.menu(linear)) + 1,), torch.inf, dtype=torch.float64)
                loss[0] = loss_of_all(plan, open_layer, linear, of_linear)
                loss[plan.choices[linear.name] or 0] = candidate.loss[spec.rank]
                tensors.update(candidate_record(candidate, linear) | {f"{linear.local}.loss": loss})
            elif ready is None:
                found[linear.local] = decompose(plan, open_layer, linear, moments[linear.local], spec.rank)
            else:
                found[linear.local] = from_record(ready, linear).first(spec.rank)

    pruned = [linear for linear in linears if kept is not None and recipe.storage.prunes(linear)]
    side_by_side(compress, {*own, *pruned})
    if ready is None:
        tensors, found = processes.united(tensors), found | _factors_of_all(found)
        own_notes = processes.notes_of_all(own_notes)
    notes |= own_notes
    for group in groups if recipe.refit != "none" else []:
        _refit_group(plan, open_layer, group, found, sweeps)
    for linear, spec in linears.items():
        if linear.local in found:
            tensors |= to_record(found[linear.local], linear)
        install(plan, open_layer, linear, part_of(tensors, linear, spec))
    return tensors


def _factors_of_all(found: Mapping[str, Factors | Channels]) -> dict[str, Factors | Channels]:
    """The factors that each process has found, in all of them."""
    tensors = processes.united(
        {
            f"{name}.{field}": value
            for name, item in found.items()
            if isinstance(item, Factors)
            for field, value in vars(item).items()
            if value is not None
        }
    )
    fields: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted(tensors):
        name, _, field = key.rpartition(".")
        fields.setdefault(name, {})[field] = tensors[key]
    return {name: Factors(**of_linear) for name, of_linear in fields.items()}


def _refit_group(
    plan: Plan,
    open_layer: OpenLayer,
    group: Group,
    found: dict[str, Factors | Channels],
    sweeps: tuple[Sweep, Sweep | None],
) -> None:
    """Refit what of a group can be: outer factors, and the weight that reads pruned channels."""
    inner: dict[str, torch.Tensor] = {}
    if group.linears[0].mixture:  # other tokens come to an expert in the dense model, and in a micro-batch perhaps none
        return
    for linear in group.linears:
        item = found.get(linear.local)
        if isinstance(item, Factors):
            inner[linear.local] = item.b.to(linear.dtype)
        elif isinstance(item, Channels) and item.form == "input-channels":
            inner[linear.local] = item.kept
    if not inner:
        return
    for local, cross in sweeps[0].collect_cross(open_layer, group, inner, sweeps[1]).items():
        item = found[local]
        if isinstance(item, Factors):
            found[local] = replace(item, a=refit(item.a, cross, plan.recipe.refit_ridge))
        else:
            found[local] = replace(item, weight=refit(item.weight, cross, plan.recipe.refit_ridge))


def _kept_channels(plan: Plan, open_layer: OpenLayer, moments: Mapping[str, Moments]) -> torch.Tensor:
    """The channels that stay in a layer's feed-forward network."""
    producers = [item for item in open_layer.layer.linears if item.role in PRODUCERS]
    (down,) = (item for item in open_layer.layer.linears if item.role == CONSUMER)
    weights = [module_weight(open_layer.linear(item.local)) for item in producers]
    split = [part for weight in weights for part in weight.split(down.d_in)]  # a fused gate and up is two
    powers = [moments[item.local].mean_square for item in (producers[0], down)]
    assert powers[0] is not None and powers[1] is not None
    scores = channel_scores(split, module_weight(open_layer.linear(down.local)), powers[0], powers[1])
    return kept_channels(scores, plan.choices[down.name] or 0, plan.recipe.least_kept)


def _pruned(plan: Plan, open_layer: OpenLayer, linear: Linear, kept: torch.Tensor) -> Channels:
    """What is left of a linear of the feed-forward network whose channels ``kept`` stay."""
    weight = module_weight(open_layer.linear(linear.local))
    shape = (linear.d_out, linear.d_in)
    if linear.role == CONSUMER:
        return Channels(weight[:, kept], kept, shape, "input-channels")
    (channels,) = (item.d_in for item in open_layer.layer.linears if item.role == CONSUMER)
    rows = torch.cat([kept + first for first in range(0, linear.d_out, channels)])
    return Channels(weight[rows], rows, shape, "output-channels")
