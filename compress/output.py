"""From the recorded parts to what is written and told: checkpoint, expected logits, predicted loss, a row per matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from calibration.replay import OpenLayer, streamed_logits
from calibration.structure import Linear
from checkpoint.forms import FORMS, Part
from checkpoint.sink import Replacement, write_dense, write_factored
from checkpoint.workdir import WorkDirectory
from compress.install import install
from compress.methods import METHODS, NATS
from compress.plan import Plan
from compress.progress import Stage
from compress.records import Parts, stage_name
from compress.sizes import Collected


def loss_at(plan: Plan, collected: Collected, linear: Linear) -> float | None:
    """The method's loss of a linear at its planned rank, in its own unit; None where it knows none (pruned channels)."""
    rank = plan.ranks[linear.name]
    if rank is None:
        return 0.0
    if rank == 0:
        return None
    losses = collected.loss.get(linear.name)
    return None if losses is None else losses[rank]


def predicted_loss(plan: Plan, collected: Collected) -> float | None:
    """Predicted KL(dense || compressed) in nats per token; None where the method's losses are in another unit."""
    if METHODS[plan.recipe.decomposition].unit != NATS:
        return None
    return sum(loss_at(plan, collected, linear) or 0.0 for linear in plan.structure.linears)


def changed_bias(plan: Plan, linear: Linear) -> int | None:
    """Elements of the bias that the linear's part changes or brings; None where it leaves the bias alone."""
    storage, rank = plan.recipe.storage, plan.ranks[linear.name] or 0
    pruned = FORMS[storage.form_of(linear)].prunes_outputs
    low_rank = storage.form_of(linear) == storage.form
    changes = (low_rank and METHODS[plan.recipe.decomposition].changes_bias) or pruned
    return storage.bias_of(linear, rank) or None if changes else None


def write(plan: Plan, work: WorkDirectory, directory: Path) -> tuple[Stage, int]:
    """Write the compressed checkpoint into ``directory``; returns the stage and the bytes of tensors."""
    parts = Parts(plan, work)
    factored = [linear for linear in plan.structure.linears if plan.ranks[linear.name]]
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

            spec = plan.recipe.storage.spec(linear, plan.ranks[linear.name] or 0)
            return Replacement(spec, linear.transposed, changed_bias(plan, linear), due)

        replaced = {linear.name: replacement(linear) for linear in factored}
        if plan.recipe.export == "dense":
            total = write_dense(plan.source, replaced, directory, [layer.path for layer in plan.removed])
        else:
            total = write_factored(plan.source, [layer.path for layer in plan.structure.layers], replaced, directory)
    if plan.recipe.export == "factored" and total != plan.sizes.bytes_after:
        raise RuntimeError(f"wrote {total} bytes of tensors where the plan said {plan.sizes.bytes_after}")
    return stage, total


def expected_logits(plan: Plan, work: WorkDirectory, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the compressed model for a few windows of ids, one layer in memory."""
    parts = Parts(plan, work)

    def prepare(open_layer: OpenLayer) -> None:
        for linear in open_layer.layer.linears:
            part = parts.part(linear)
            if part is not None:
                install(plan, open_layer, linear, part)

    return streamed_logits(plan.source, plan.structure, ids, prepare, plan.removed)


def matrix_rows(plan: Plan, work: WorkDirectory, collected: Collected) -> list[dict[str, Any]]:
    """One row per linear for the CSV: rank, kept parameters, relative error ``(loss / loss of dropping all)^0.5``, seconds."""
    rows = []
    for layer in plan.structure.layers:
        notes = work.notes(stage_name(plan), layer.index)
        for linear in layer.linears:
            rank = plan.ranks[linear.name]
            parameters = plan.recipe.storage.parameters(linear, rank)
            loss = loss_at(plan, collected, linear)
            whole = collected.loss.get(linear.name, (0.0,))[0]
            rows.append(
                {
                    "layer": layer.index,
                    "matrix": linear.local,
                    "d_out": linear.d_out,
                    "d_in": linear.d_in,
                    "rank": {None: "dense", 0: "removed"}.get(rank, rank),
                    "parameters": parameters,
                    "kept": round(parameters / (linear.d_out * linear.d_in), 4),
                    "relative_error": "" if loss is None else round((loss / whole) ** 0.5, 6) if whole > 0 else 0.0,
                    "loss": "" if loss is None else float(f"{loss:.6g}"),
                    "seconds": notes.get(linear.local, {}).get("seconds", 0.0),
                }
            )
    return rows
