"""What collecting leaves in the work directory, and how the plan's parts are read back.

Stage ``factors`` holds every linear's ordered factors at every rank that saves, from the dense model's statistics: any
ratio is a slice. A walk over the compressed model (sequential recipes, and refits) belongs to one choice of ranks and has a
stage of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from calibration.structure import Linear
from checkpoint.forms import Part
from checkpoint.workdir import WorkDirectory
from compress.parts import Factors
from compress.pivoting import PART_FORMS
from compress.plan import Plan
from compress.sizes import Collected

DENSE_STAGE = "factors"
MEANS = ("mean_input", "mean_output")


def stage_name(plan: Plan) -> str:
    """Where the parts that a plan writes are recorded."""
    recipe = plan.recipe
    if not recipe.walks:
        return DENSE_STAGE
    refit = f"{recipe.refit}-{recipe.refit_ridge:g}"
    return f"walk-{recipe.ratio_scope}-{plan.ratio:g}-{recipe.allocation}-{refit}-{recipe.export}"


def to_record(factors: Factors, linear: Linear) -> dict[str, torch.Tensor]:
    """Factors in the dtype in which they will be stored, losses and means as they are."""
    tensors = {"a": factors.a.to(linear.dtype), "b": factors.b.to(linear.dtype), "loss": factors.loss}
    if factors.mean_input is not None and factors.mean_output is not None:
        tensors |= {"mean_input": factors.mean_input, "mean_output": factors.mean_output}
    return {f"{linear.local}.{key}": value for key, value in tensors.items()}


def from_record(tensors: Mapping[str, torch.Tensor], linear: Linear) -> Factors:
    """The factors that ``to_record`` stored."""
    a, b, loss, *means = (tensors.get(f"{linear.local}.{key}") for key in ("a", "b", "loss", *MEANS))
    assert a is not None and b is not None and loss is not None
    return Factors(a, b, loss, *means)


def part_of(plan: Plan, factors: Factors, rank: int) -> Part:
    """The part that a plan stores: factors cut to a rank, in the recipe's form."""
    return PART_FORMS[plan.recipe.form](factors.at_rank(rank))


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
        return part_of(self._plan, from_record(self._tensors, linear), rank)


def read_collected(plan: Plan, work: WorkDirectory, stage: str, tokens: int) -> Collected:
    """What the records of a stage say of every linear that can be factored."""
    losses: dict[str, tuple[float, ...]] = {}
    spectra: dict[str, tuple[float, ...]] = {}
    for layer in plan.structure.layers:
        for ending, found in (("loss", losses), ("spectrum", spectra)):
            record = work.get(stage, layer.index, ending=f".{ending}")
            for linear in layer.linears:
                if f"{linear.local}.{ending}" in record:
                    found[linear.name] = tuple(record[f"{linear.local}.{ending}"].tolist())
    return Collected(losses, spectra, tokens)
