"""The plan: everything validated and estimated from headers and shapes, before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from calibration import attention
from calibration.gram import has_bfloat16_products
from calibration.structure import Layer, Linear, Structure, discover
from checkpoint.device import CPU, name_of
from checkpoint.errors import UserError
from checkpoint.forms import Spec
from checkpoint.source import Source, read_config
from checkpoint.workdir import free_bytes
from compress.allocations import ALLOCATIONS
from compress.estimate import Estimate, estimate
from compress.menu import REMOVED
from compress.recipe import Recipe
from compress.sizes import NOTHING, Collected, Sizes, choose, measure

AMPERE = (8, 0)  # the compute capability of the first GPUs with products in bfloat16


@dataclass(frozen=True)
class Plan:
    """A validated run: the source, its structure, choices and sizes for one target ratio.

    ``choices`` are from the menu of each linear (compress/menu.py). Where the allocation reads losses, they and the sizes are
    uniform ones until ``with_choices`` puts the chosen in. ``passes`` over each layer collect its moments.
    """

    source: Source
    structure: Structure
    recipe: Recipe
    ratio: float
    choices: dict[str, int | None]
    sizes: Sizes
    estimate: Estimate
    dtype_reason: str
    passes: int

    @property
    def units(self) -> list[Linear]:
        """Everything that has a menu of its own."""
        return self.recipe.units(self.structure)

    @property
    def removed(self) -> list[Layer]:
        """Layers that are removed as a whole."""
        return removed_layers(self.structure, self.choices)

    def spec(self, linear: Linear) -> Spec | None:
        """How a linear will be stored; None where it stays dense or is removed."""
        choice = self.choices[linear.name]
        return self.recipe.storage.spec(linear, choice) if choice else None

    def with_choices(self, collected: Collected) -> Plan:
        """The plan with what its allocation chooses from what was collected."""
        return make_plan(
            self.source, self.structure, self.recipe, self.ratio, self.dtype_reason, self.passes, collected
        )


def compute_dtype(
    asked: str, directory: Path, trust_remote_code: bool, device: torch.device
) -> tuple[torch.dtype, str]:
    """The dtype in which layers run on ``device``, and why."""
    if asked != "auto":
        return getattr(torch, asked), "asked for"
    stored = getattr(read_config(directory, trust_remote_code), "dtype", None)
    if stored not in (torch.bfloat16, torch.float16):
        return torch.float32, "the source is float32"
    natively = has_bfloat16_products() if device.type == "cpu" else torch.cuda.get_device_capability(device) >= AMPERE
    what = "this machine" if device.type == "cpu" else name_of(device)
    if natively:
        return torch.bfloat16, f"{what} multiplies bfloat16 natively"
    return torch.float32, f"{what} has no native bfloat16 products"


def make_source(
    directory: Path, recipe: Recipe, trust_remote_code: bool, device: torch.device = CPU
) -> tuple[Source, Structure, str]:
    """Open the checkpoint, whose layers will run on ``device``, and discover its structure (UserError where that fails)."""
    dtype, reason = compute_dtype(recipe.dtype, directory, trust_remote_code, device)
    # other formats are stock architectures, whose experts are stacked
    source = Source(directory, dtype, trust_remote_code, separate_experts=recipe.export == "factored")
    attention.use(source.model)
    if recipe.export == "factored" and not type(source.model).__module__.startswith("transformers."):
        raise UserError(
            "--export factored needs a model class of transformers, this one is remote code; say --export dense"
        )
    structure = discover(source)
    if recipe.export == "adapter":
        transposed = next((linear.name for linear in structure.linears if linear.transposed), None)
        if transposed:
            raise UserError(
                f"--export adapter: compressed-tensors cannot hold {transposed}, which is stored transposed; say --export factored"
            )
    return source, structure, reason


def make_plan(
    source: Source,
    structure: Structure,
    recipe: Recipe,
    ratio: float,
    reason: str,
    passes: int = 1,
    collected: Collected = NOTHING,
) -> Plan:
    """Ranks, sizes and estimates for one target ratio (UserError if it cannot be reached)."""
    if not 0 < ratio < 1:
        raise UserError(f"--target-ratio {ratio:g} must be above 0 and below 1: the part of the bytes to keep")
    allocation = recipe.allocation
    if ALLOCATIONS[allocation].reads and collected is NOTHING and not ALLOCATIONS[allocation].plans_itself:
        allocation = "uniform"
    units = recipe.units(structure)
    choices = choose(units, source.nbytes, ratio, recipe.ratio_scope, allocation, recipe.storage, collected)
    parameters = sum(torch.Size(item.shape).numel() for item in source.used_tensors())
    beside = [
        item
        for layer in removed_layers(structure, choices)
        for name in source.parameter_names([layer.path])
        if name not in {f"{linear.name}.weight" for linear in layer.linears}
        for item in source.all_stored(name)
    ]
    removed = sum(item.nbytes for item in beside), sum(torch.Size(item.shape).numel() for item in beside)
    sizes = measure(units, choices, recipe.storage, source.nbytes, parameters, recipe.ratio_scope, removed)
    if abs(sizes.achieved_ratio - ratio) > 0.005:
        raise UserError(
            f"--target-ratio {ratio:g} cannot be met to 0.005: ranks, bits and layers are whole and the nearest below gives "
            f"{math.ceil(sizes.achieved_ratio * 1e4) / 1e4:.4f}; ask for that"
        )
    expected = estimate(source, structure, recipe, sizes, passes)
    return Plan(source, structure, recipe, ratio, choices, sizes, expected, reason, passes)


def removed_layers(structure: Structure, choices: Mapping[str, int | None]) -> list[Layer]:
    """Layers of which nothing is left."""
    return [
        layer
        for layer in structure.layers
        if layer.linears and all(choices[item.name] == REMOVED for item in layer.linears)
    ]


def check_disk(plan: Plan, output: Path, work: Path) -> None:
    """Raise UserError if output and work directory do not fit on their disks."""
    for path, needed in ((work, plan.estimate.disk_bytes), (output, plan.sizes.bytes_after)):
        free = free_bytes(path)
        if free < needed:
            raise UserError(
                f"no room on disk for {path}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
                "free some or name another place with --output and --work-dir"
            )


def format_plan(plan: Plan, output: Path, work: Path) -> str:
    """The plan as a person reads it."""
    recipe, sizes, estimate, source = plan.recipe, plan.sizes, plan.estimate, plan.source
    chosen = f"{sum(choice is not None for choice in plan.choices.values())} of {len(plan.choices)} linears compressed"
    if plan.removed:
        chosen = f"{len(plan.removed)} of {len(plan.structure.layers)} layers removed"
    open_yet = bool(ALLOCATIONS[recipe.allocation].reads) and not ALLOCATIONS[recipe.allocation].plans_itself
    if open_yet:
        chosen = "each linear's share is chosen when the losses are known"
    at_a_time = f"{recipe.micro_batch} windows at a time" if recipe.needs else "a layer at a time"
    if plan.passes > 1:
        at_a_time += f", {plan.passes} passes over a layer"
    lines = [
        f"model      {source.directory}: {type(source.model).__name__}, {len(plan.structure.layers)} layers, "
        f"{sizes.bytes_before / 1e6:.1f} MB, computed in {str(source.compute_dtype).removeprefix('torch.')} ({plan.dtype_reason})",
        f"recipe     {recipe.name}: {recipe.summary} [{recipe.decomposition}, {recipe.allocation}, {recipe.mode}]",
        f"sizes      asked {plan.ratio:g} of the {recipe.ratio_scope}, planned {'about ' if open_yet else ''}{sizes.achieved_ratio:.4f}: "
        f"{sizes.bytes_after / 1e6:.1f} MB, {chosen}",
        f"           decoder parameters {sizes.decoder_linear_parameters:.3f}, model parameters {sizes.model_parameters:.3f}, "
        f"bytes {sizes.model_bytes:.3f}, {sizes.bits_per_decoder_weight:.2f} bits per decoder weight",
        f"text       {recipe.calibration}, {recipe.calibration_tokens:,} tokens in windows of {recipe.sequence_length}"
        if recipe.needs
        else "text       none needed",
        f"needs      {estimate.memory_bytes / 1e9:.2f} GB memory ({at_a_time}), about "
        f"{(estimate.disk_bytes + sizes.bytes_after) / 1e9:.2f} GB disk, {_duration(estimate.seconds)} before evaluation",
        f"output     {output} (work in {work})",
    ]
    if plan.structure.left_dense:
        lines.append(f"LEFT DENSE {len(plan.structure.left_dense)} parameters are not compressed:")
        lines += [f"           {name}: {reason}" for name, reason in plan.structure.left_dense[:8]]
        if len(plan.structure.left_dense) > 8:
            lines.append(f"           ... and {len(plan.structure.left_dense) - 8} more (all are in report.json)")
    if source.unused:
        lines.append(
            f"NOT USED   {len(source.unused)} stored tensors are not part of the model class, e.g. {source.unused[0]}; left out"
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
