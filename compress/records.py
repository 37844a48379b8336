"""What collecting leaves in the work directory, and how the plan's parts are read back.

Stage ``factors`` holds, from the dense model's statistics, every linear's ordered factors at every rank that saves, and its codes
on every grid that may be chosen: any ratio is a slice. A walk over the compressed model (sequential recipes, and refits)
belongs to one set of choices and has a stage of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from calibration.structure import Linear
from checkpoint.forms import Grid, Part, Spec
from checkpoint.workdir import WorkDirectory
from compress.candidates import Candidate
from compress.packing import Packed, pack_rows, quantized_factors, unpack_rows
from compress.parts import Channels, Factors, LowRank
from compress.pivoting import PART_FORMS
from compress.plan import Plan
from compress.quantizers import Quantized
from compress.sizes import Collected

DENSE_STAGE = "factors"
SEARCH_STAGE = "search"  # losses of the model with one linear compressed
RECORDS = 8  # their format, and the arithmetic that made them: what another version of layerpress left cannot be read
MEANS = ("mean_input", "mean_output")


def stage_name(plan: Plan) -> str:
    """Where the parts that a plan writes are recorded."""
    recipe = plan.recipe
    if not recipe.walks:
        return DENSE_STAGE
    refit = f"{recipe.refit}-{recipe.refit_ridge:g}"
    feed_forward = f"{recipe.feed_forward}-{recipe.least_kept:g}"
    return f"walk-{recipe.ratio_scope}-{plan.ratio:g}-{recipe.allocation}-{feed_forward}-{refit}-{recipe.export}"


def to_record(found: Factors | Channels, linear: Linear) -> dict[str, torch.Tensor]:
    """What was found in the dtype in which it will be stored, in the host's memory; losses, means and indices as they are."""
    if isinstance(found, Channels):
        tensors = {"weight": found.weight.to(linear.dtype), "kept": found.kept.clone()}
    else:
        tensors = {"a": found.a.to(linear.dtype), "b": found.b.to(linear.dtype), "loss": found.loss}
        if found.mean_input is not None and found.mean_output is not None:
            tensors |= {"mean_input": found.mean_input, "mean_output": found.mean_output}
    return {f"{linear.local}.{key}": value.cpu() for key, value in tensors.items()}


def from_record(tensors: Mapping[str, torch.Tensor], linear: Linear) -> Factors:
    """The factors that ``to_record`` stored."""
    a, b, loss, *means = (tensors.get(f"{linear.local}.{key}") for key in ("a", "b", "loss", *MEANS))
    assert a is not None and b is not None and loss is not None
    return Factors(a, b, loss, *means)


def part_of(tensors: Mapping[str, torch.Tensor], linear: Linear, spec: Spec) -> Part:
    """The part that a plan stores: recorded factors or codes, cut to a rank and put in their form, or recorded channels."""
    if spec.weight is not None:
        return _packed_part(tensors, linear, spec, spec.weight)
    if spec.factors is not None:
        return quantized_factors(from_record(tensors, linear).at_rank(spec.rank), spec.factors)
    if spec.form in PART_FORMS:
        return PART_FORMS[spec.form](from_record(tensors, linear).at_rank(spec.rank))
    weight, kept = tensors[f"{linear.local}.weight"], tensors[f"{linear.local}.kept"]
    return Channels(weight, kept, (linear.d_out, linear.d_in), spec.form)


def candidate_record(found: Candidate, linear: Linear) -> dict[str, torch.Tensor]:
    """Codes (packed: a record holds those of every grid), scales and correction of a candidate, by linear and grid."""
    tensors = {"codes": pack_rows(found.weight.codes.cpu(), found.weight.grid.bits), "scale": found.weight.scale}
    if found.weight.zero is not None:
        tensors["zero"] = found.weight.zero
    if found.correction is not None:
        tensors |= {"a": found.correction.a.to(linear.dtype), "b": found.correction.b.to(linear.dtype)}
    return {f"{linear.local}.{_tag(found.weight.grid)}.{key}": value.cpu() for key, value in tensors.items()}


def _tag(grid: Grid) -> str:
    """A grid's name in a record."""
    kind = "exponents" if grid.power_of_two else "symmetric" if grid.symmetric else "asymmetric"
    return f"{grid.bits}-{grid.group_size}-{kind}"


def _packed_part(tensors: Mapping[str, torch.Tensor], linear: Linear, spec: Spec, grid: Grid) -> Packed:
    prefix = f"{linear.local}.{_tag(grid)}"
    codes = unpack_rows(tensors[f"{prefix}.codes"], grid.bits, linear.d_in)
    weight = Quantized(codes, tensors[f"{prefix}.scale"], tensors.get(f"{prefix}.zero"), grid)
    if not spec.rank:
        return Packed(weight)
    correction = LowRank(tensors[f"{prefix}.a"][:, : spec.rank], tensors[f"{prefix}.b"][: spec.rank])
    return Packed(weight, quantized_factors(correction, spec.factors) if spec.factors else correction)


class Parts:
    """The recorded parts of a plan, one linear's record in memory at a time."""

    def __init__(self, plan: Plan, work: WorkDirectory) -> None:
        self._plan, self._work = plan, work

    def part(self, linear: Linear) -> Part | None:
        """The linear's part as planned; None where it stays dense."""
        spec = self._plan.spec(linear)
        if spec is None:
            return None
        tensors = self._work.get(stage_name(self._plan), linear.layer, starting=f"{linear.local}.")
        return part_of(tensors, linear, spec)


def read_collected(plan: Plan, work: WorkDirectory, stage: str, tokens: int) -> Collected:
    """What the records of a stage say of every linear that can be factored."""
    losses: dict[str, tuple[float, ...]] = {}
    spectra: dict[str, tuple[float, ...]] = {}
    sensitivity: dict[str, tuple[float, ...]] = {}
    influence: dict[int, float] = {}
    found = {"loss": losses, "spectrum": spectra, "sensitivity": sensitivity}
    for index in sorted({unit.layer for unit in plan.units}):
        record = work.get(stage, index, ending=(".loss", ".spectrum", "influence"))
        if work.done(SEARCH_STAGE, index):
            record |= work.get(SEARCH_STAGE, index)
        if "influence" in record:
            influence[index] = float(record["influence"])
        for linear in (unit for unit in plan.units if unit.layer == index):
            for ending, values in found.items():
                if f"{linear.local}.{ending}" in record:
                    values[linear.name] = tuple(record[f"{linear.local}.{ending}"].tolist())
    return Collected(losses, spectra, sensitivity, influence, tokens)
