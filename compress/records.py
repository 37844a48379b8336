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
from compress.parts import Channels, Factors
from compress.pivoting import PART_FORMS
from compress.plan import Plan
from compress.sizes import Collected

DENSE_STAGE = "factors"
SEARCH_STAGE = "search"  # losses of the model with one linear compressed
MEANS = ("mean_input", "mean_output")


def stage_name(plan: Plan) -> str:
    """Where the parts that a plan writes are recorded."""
    recipe = plan.recipe
    if not recipe.walks:
        return DENSE_STAGE
    refit = f"{recipe.refit}-{recipe.refit_ridge:g}"
    return f"walk-{recipe.ratio_scope}-{plan.ratio:g}-{recipe.allocation}-{recipe.feed_forward}-{refit}-{recipe.export}"


def to_record(found: Factors | Channels, linear: Linear) -> dict[str, torch.Tensor]:
    """What was found in the dtype in which it will be stored; losses, means and indices as they are."""
    if isinstance(found, Channels):
        tensors = {"weight": found.weight.to(linear.dtype), "kept": found.kept.clone()}
    else:
        tensors = {"a": found.a.to(linear.dtype), "b": found.b.to(linear.dtype), "loss": found.loss}
        if found.mean_input is not None and found.mean_output is not None:
            tensors |= {"mean_input": found.mean_input, "mean_output": found.mean_output}
    return {f"{linear.local}.{key}": value for key, value in tensors.items()}


def from_record(tensors: Mapping[str, torch.Tensor], linear: Linear) -> Factors:
    """The factors that ``to_record`` stored."""
    a, b, loss, *means = (tensors.get(f"{linear.local}.{key}") for key in ("a", "b", "loss", *MEANS))
    assert a is not None and b is not None and loss is not None
    return Factors(a, b, loss, *means)


def part_of(plan: Plan, tensors: Mapping[str, torch.Tensor], linear: Linear, rank: int) -> Part:
    """The part that a plan stores: recorded factors cut to a rank, in the recipe's form, or recorded channels."""
    form = plan.recipe.storage.form_of(linear)
    if form in PART_FORMS:
        return PART_FORMS[form](from_record(tensors, linear).at_rank(rank))
    weight, kept = tensors[f"{linear.local}.weight"], tensors[f"{linear.local}.kept"]
    return Channels(weight, kept, (linear.d_out, linear.d_in), form)


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
        return part_of(self._plan, self._tensors, linear, rank)


def read_collected(plan: Plan, work: WorkDirectory, stage: str, tokens: int) -> Collected:
    """What the records of a stage say of every linear that can be factored."""
    losses: dict[str, tuple[float, ...]] = {}
    spectra: dict[str, tuple[float, ...]] = {}
    sensitivity: dict[str, tuple[float, ...]] = {}
    influence: dict[int, float] = {}
    found = {"loss": losses, "spectrum": spectra, "sensitivity": sensitivity}
    for layer in plan.structure.layers:
        record = work.get(stage, layer.index, ending=(".loss", ".spectrum", "influence"))
        if work.done(SEARCH_STAGE, layer.index):
            record |= work.get(SEARCH_STAGE, layer.index)
        if "influence" in record:
            influence[layer.index] = float(record["influence"])
        for linear in layer.linears:
            for ending, values in found.items():
                if f"{linear.local}.{ending}" in record:
                    values[linear.name] = tuple(record[f"{linear.local}.{ending}"].tolist())
    return Collected(losses, spectra, sensitivity, influence, tokens)
