"""From the recorded parts to what is written and told: checkpoint, expected logits, predicted loss, a row per matrix."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from calibration.replay import OpenLayer, streamed_logits
from calibration.roles import ENDS
from calibration.structure import Linear
from checkpoint.adapter import SHAPE_BYTES, write_adapter
from checkpoint.forms import FORMS, Part
from checkpoint.progress import Stage
from checkpoint.sink import Replacement, write_dense, write_factored
from checkpoint.workdir import WorkDirectory
from compress.install import install
from compress.menu import REMOVED
from compress.methods import METHODS, NATS
from compress.plan import Plan
from compress.records import DENSE_STAGE, Parts, stage_name
from compress.sizes import Collected


def loss_at(plan: Plan, collected: Collected, linear: Linear) -> float | None:
    """The method's loss of a linear as it will be stored, in its own unit; None where it knows none (pruned channels)."""
    choice = plan.choices[linear.name]
    if choice is None:
        return 0.0
    losses = collected.loss.get(linear.name)
    return None if losses is None or choice == REMOVED else losses[choice]


def predicted_loss(plan: Plan, collected: Collected) -> float | None:
    """Predicted KL(dense || compressed) in nats per token; None where the method's losses are in another unit."""
    if METHODS[plan.recipe.decomposition].unit != NATS:
        return None
    return sum(loss_at(plan, collected, linear) or 0.0 for linear in plan.units)


def changed_bias(plan: Plan, linear: Linear) -> int | None:
    """Elements of the bias that the linear's part changes or brings; None where it leaves the bias alone."""
    storage, spec = plan.recipe.storage, plan.spec(linear)
    assert spec is not None
    low_rank = spec.form == storage.form
    changes = (low_rank and METHODS[plan.recipe.decomposition].changes_bias) or FORMS[spec.form].prunes_outputs
    return storage.bias_of(linear, spec) or None if changes else None


def write(plan: Plan, work: WorkDirectory, directory: Path) -> tuple[Stage, int]:
    """Write the compressed checkpoint into ``directory``; returns the stage and the bytes of tensors."""
    parts = Parts(plan, work)
    factored = [linear for linear in plan.units if plan.choices[linear.name]]
    written: set[str] = set()
    with Stage("writing", len(factored), "matrices") as stage:

        def replacement(linear: Linear) -> Replacement:
            def due() -> Part:
                part = parts.part(linear)
                assert part is not None
                if linear.name not in written:  # a changed bias may be due apart from its weight
                    written.add(linear.name)
                    stage.step()
                return part

            spec = plan.spec(linear)
            assert spec is not None
            return Replacement(spec, linear.transposed, changed_bias(plan, linear), due)

        replaced = {linear.name: replacement(linear) for linear in factored}
        if plan.recipe.export == "dense":
            total = write_dense(plan.source, replaced, directory, [layer.path for layer in plan.removed])
        elif plan.recipe.export == "adapter":
            total = write_adapter(plan.source, replaced, directory)
        else:
            layers = [layer.path for layer in plan.structure.layers]
            total = write_factored(plan.source, layers, replaced, directory, plan.recipe.runtime)
    shapes = SHAPE_BYTES * len(replaced) if plan.recipe.export == "adapter" else 0
    if plan.recipe.export != "dense" and total != plan.sizes.bytes_after + shapes:
        raise RuntimeError(f"wrote {total} bytes of tensors where the plan said {plan.sizes.bytes_after + shapes}")
    return stage, total


def expected_logits(plan: Plan, work: WorkDirectory, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the compressed model for a few windows of ids, one layer in memory."""
    parts = Parts(plan, work)

    def prepare(open_layer: OpenLayer) -> None:
        for linear in open_layer.layer.linears:
            part = parts.part(linear)
            if part is not None:
                install(plan, open_layer, linear, part)

    return streamed_logits(plan.source, plan.structure, ids, prepare, plan.removed, _Ends(plan, parts))


class _Ends(Mapping[str, torch.Tensor]):
    """What embedding and head are once they are compressed, by parameter name; made when asked for, and not kept."""

    def __init__(self, plan: Plan, parts: Parts) -> None:
        self._parts = parts
        self._units = {
            f"{unit.name}.weight": unit
            for unit in plan.units
            if unit.role in ENDS and plan.choices[unit.name] is not None
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        part = self._parts.part(self._units[name])
        assert part is not None
        return part.dense()

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)


def mended(plan: Plan, work: WorkDirectory) -> dict[str, int]:
    """What had to be mended in the numbers of all linears, and how often (compress/counts.py)."""
    stages = {DENSE_STAGE, stage_name(plan)}
    total: Counter[str] = Counter()
    for stage, index in ((stage, index) for stage in sorted(stages) for index in {unit.layer for unit in plan.units}):
        if work.done(stage, index):
            for note in work.notes(stage, index).values():
                total.update(note["mended"])
    return dict(sorted(total.items()))


def matrix_rows(plan: Plan, work: WorkDirectory, collected: Collected) -> list[dict[str, Any]]:
    """One row per linear for the CSV: how it is stored, kept parameters, relative error ``(loss / loss of dropping all)^0.5``, seconds."""
    rows = []
    ends = [[unit for unit in plan.units if unit.role in ENDS]]
    for linears in [layer.linears for layer in plan.structure.layers] + ends:
        notes = work.notes(stage_name(plan), linears[0].layer) if linears else {}
        for linear in linears:
            choice, spec = plan.choices[linear.name], plan.spec(linear)
            parameters = plan.recipe.storage.parameters(linear, choice)
            loss = loss_at(plan, collected, linear)
            whole = collected.loss.get(linear.name, (0.0,))[0]
            relative = "" if loss is None or math.isinf(whole) else round((loss / whole) ** 0.5, 6) if whole else 0.0
            rows.append(
                {
                    "layer": linear.layer if linear.role not in ENDS else "",
                    "matrix": linear.local,
                    "d_out": linear.d_out,
                    "d_in": linear.d_in,
                    "form": spec.form if spec else "dense" if choice is None else "removed",
                    "rank": spec.rank if spec else "",
                    "bits": spec.weight.bits if spec and spec.weight else "",
                    "group_size": spec.weight.group_size if spec and spec.weight else "",
                    "factor_bits": spec.factors.bits if spec and spec.factors else "",
                    "bytes": plan.recipe.storage.nbytes(linear, choice),
                    "parameters": parameters,
                    "share": linear.share,
                    "kept": round(parameters / (linear.d_out * linear.d_in), 4),
                    "relative_error": relative,
                    "loss": "" if loss is None else float(f"{loss:.6g}"),
                    "seconds": notes.get(linear.local, {}).get("seconds", 0.0),
                }
            )
    return rows


CURVE_POINTS = 24


def curves(plan: Plan, collected: Collected) -> list[dict[str, Any]]:
    """Loss against size of every linear that has losses, for the report's plots.

    Of the menu what nothing smaller beats, thinned to ``CURVE_POINTS``; sizes are parts of the dense bytes, losses of dropping all.
    """
    found = []
    for linear in plan.units:
        losses = collected.loss.get(linear.name, ())
        if not losses or not math.isfinite(losses[0]) or losses[0] <= 0:
            continue
        whole, least, best = losses[0], math.inf, list[tuple[float, float]]()
        for size, loss in zip(plan.recipe.storage.sizes(linear), losses, strict=False):
            if 0 < loss < least:
                least = loss
                best.append((round(size / linear.nbytes, 4), float(f"{loss / whole:.4g}")))
        step = max((len(best) - 1) / (CURVE_POINTS - 1), 1.0)
        kept = sorted({round(index * step) for index in range(CURVE_POINTS)} & set(range(len(best))))
        choice, loss_there = plan.choices[linear.name], loss_at(plan, collected, linear)
        cut = None
        if choice is not None and choice != REMOVED and loss_there:
            cut = (round(plan.recipe.storage.nbytes(linear, choice) / linear.nbytes, 4), loss_there / whole)
        found.append(
            {
                "name": linear.name,
                "role": linear.role,
                "layer": linear.layer,
                "points": [best[index] for index in kept],
                "chosen": cut,
            }
        )
    return found
