"""What a run will take: memory, disk and time, from headers and shapes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from calibration.products import product
from calibration.structure import Linear, Structure
from checkpoint.source import Source
from compress.allocations import ALLOCATIONS
from compress.allocations.sensitivity import RATIOS
from compress.footprint import Footprint, footprints, kept_sums, record_bytes
from compress.quantizers import QUANTIZERS
from compress.quantizers.two_sided import grids_together, rows_together
from compress.recipe import Recipe
from compress.sizes import Sizes

COLUMN_SECONDS, SEARCH_SECONDS = 5e-5, 4e-8  # a step of a rounding; the scale of a weight: measured
BACKWARD_PASSES = 3.0  # of tokens that go backward: forward again, and the gradients of inputs and outputs
SEQUENTIAL_PASSES = 3.5  # each group stops its pass where it has run; then the whole layer once


@dataclass(frozen=True)
class Estimate:
    """What the run will take: bytes of memory, stage by stage, and roughly bytes of disk and seconds."""

    footprints: list[Footprint]
    disk_bytes: int
    seconds: float

    @property
    def memory_bytes(self) -> int:
        """The peak of all stages."""
        return max(item.nbytes for item in self.footprints)


def estimate(source: Source, structure: Structure, recipe: Recipe, sizes: Sizes, passes: int) -> Estimate:
    """From headers and shapes alone, and the speed of a small product on this machine; ``passes`` over each layer."""
    width = max(linear.d_in for linear in structure.layers[0].groups[0].linears)
    tokens = recipe.calibration_tokens if recipe.needs else 0
    itemsize = source.compute_dtype.itemsize
    backward = recipe.backward
    # of what goes backward every layer's input is kept; of the rest the input and the output of one layer
    # (and what attention gave, where it is passed over again and again)
    kept = min(tokens, recipe.gradient_tokens) if backward else 0
    hidden = width * itemsize * (kept * (len(structure.layers) + 3) + (tokens - kept) * (3 if recipe.walks else 2))
    if backward:  # and the sums over what does not go backward
        hidden += sum(sum(kept_sums(group, recipe).values()) for layer in structure.layers for group in layer.groups)
    if "sensitivity" in ALLOCATIONS[recipe.allocation].reads:  # the variants behind one layer, before and after another
        variants = len(RATIOS) * max(len(layer.linears) for layer in structure.layers)
        hidden += 2 * variants * min(recipe.search_tokens, tokens) * width * itemsize
    records = sum(record_bytes(recipe, unit) for unit in recipe.units(structure))
    # a layer's matrices lie aside while its record is written
    records += max(sum(record_bytes(recipe, item) for item in layer.linears) for layer in structure.layers)
    if recipe.mode == "sequential":
        records = sizes.bytes_after
    memory = footprints(source, structure, recipe, passes)
    return Estimate(memory, hidden + records, _seconds(source, structure, recipe, tokens, passes))


def _seconds(source: Source, structure: Structure, recipe: Recipe, tokens: int, over_a_layer: int) -> float:
    backward = recipe.backward
    gradient_tokens = min(tokens, recipe.gradient_tokens) if backward else 0
    passes = SEQUENTIAL_PASSES if recipe.mode == "sequential" else over_a_layer
    rows = passes * tokens + over_a_layer * BACKWARD_PASSES * gradient_tokens
    flops = 2.0 * rows * sum(linear.d_in * linear.d_out * linear.share for linear in structure.linears)
    squares = sum(
        group.linears[0].share * min(group.linears[0].d_in, group.linears[0].d_out) ** 2
        for layer in structure.layers
        for group in layer.groups
    )
    solving = sum(
        25.0 * min(linear.d_in, linear.d_out) ** 3 + 6.0 * linear.d_in * linear.d_out * min(linear.d_in, linear.d_out)
        for linear in structure.linears
    )
    quantizing = 0.0
    if recipe.storage.grids:
        quantizing = sum(_quantizing_seconds(recipe, linear) for linear in structure.linears)
        # the errors of every column go to all later ones, on every grid
        solving += sum(len(recipe.storage.grids) * linear.d_out * linear.d_in**2 for linear in structure.linears)
        sides = sum(group.linears[0].d_in ** 2 for layer in structure.layers for group in layer.groups)
        flops += 1.0 * tokens * sides  # half of a product: symmetric
        flops += 1.0 * gradient_tokens * sum(linear.d_out**2 for linear in structure.linears)
    reading = 3 * source.nbytes / 1e9
    if "sensitivity" in ALLOCATIONS[recipe.allocation].reads:
        # every variant of a layer's linears goes through the layers behind it, and through the head
        depth = len(structure.layers)
        variants = len(RATIOS) * len(structure.linears) * min(recipe.search_tokens, tokens)
        head = sum(source.tensor(name).numel() for name in structure.back)
        flops += 2.0 * variants * (sum(linear.d_in * linear.d_out for linear in structure.linears) / 2 + head)
        reading += depth / 2 * source.nbytes / 1e9
    return (
        flops / _flops_per_second(source.compute_dtype)
        + 2.0 * (tokens + gradient_tokens) * squares / _flops_per_second(torch.float32)
        + solving / _flops_per_second(torch.float64)
        + quantizing
        + reading
    )


def _quantizing_seconds(recipe: Recipe, linear: Linear) -> float:
    """Of the steps that no matrix product hides: a column of a block of rows at a time, and the search for scales."""
    weights, grids = linear.d_out * linear.d_in, len(recipe.storage.grids)
    blocks, passes = 1, grids
    if QUANTIZERS[recipe.quantizer].outputs:
        blocks, passes = -(-linear.d_out // rows_together(linear.d_out)), -(-grids // grids_together(weights))
    return COLUMN_SECONDS * passes * blocks * linear.d_in + SEARCH_SECONDS * grids * weights


def _flops_per_second(dtype: torch.dtype, size: int = 512, repeats: int = 3) -> float:
    """This machine's speed in a small matrix product."""
    a = torch.ones(size, size, dtype=dtype)
    product(a, a)
    started = time.perf_counter()
    for _ in range(repeats):
        product(a, a)
    return 2.0 * size**3 * repeats / (time.perf_counter() - started)
