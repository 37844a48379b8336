"""What a run will take: memory, disk and time, from headers and shapes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from calibration.labels import LOGIT_BYTES
from calibration.roles import ENDS
from calibration.structure import Layer, Linear, Structure
from calibration.sweep import SAMPLES
from checkpoint.source import Source
from compress.allocations import ALLOCATIONS
from compress.allocations.sensitivity import RATIOS
from compress.quantizers import QUANTIZERS
from compress.quantizers.two_sided import ROWS, TOGETHER
from compress.recipe import Recipe
from compress.sizes import Sizes

PROCESS_BYTES = 560_000_000  # Python, torch, transformers and the heap before any layer: measured
COLUMN_SECONDS, SEARCH_SECONDS = 5e-5, 4e-8  # a step of a rounding; the scale of a weight: measured
BACKWARD_PASSES = 4.0  # forward; forward again, and the gradients of inputs and outputs
SEQUENTIAL_PASSES = 3.5  # each group stops its pass where it has run; then the whole layer once


@dataclass(frozen=True)
class Estimate:
    """What the run will take, roughly: bytes of memory and disk, seconds."""

    memory_bytes: int
    disk_bytes: int
    seconds: float


def estimate(source: Source, structure: Structure, recipe: Recipe, sizes: Sizes) -> Estimate:
    """From headers and shapes alone, and the speed of a small product on this machine."""
    width = max(linear.d_in for linear in structure.layers[0].groups[0].linears)
    tokens = recipe.calibration_tokens if recipe.needs else 0
    itemsize = source.compute_dtype.itemsize
    backward = recipe.backward
    # a backward sweep keeps every layer's input; a forward one the input and the output of one layer
    hidden = tokens * width * itemsize * (len(structure.layers) + 3 if backward else 2)
    if "sensitivity" in ALLOCATIONS[recipe.allocation].reads:  # the variants behind one layer, before and after another
        variants = len(RATIOS) * max(len(layer.linears) for layer in structure.layers)
        hidden += 2 * variants * min(recipe.search_tokens, tokens) * width * itemsize
    records = sum(_record_bytes(recipe, unit) for unit in recipe.units(structure))
    if recipe.mode == "sequential":
        records = sizes.bytes_after
    layer_bytes = max(_layer_memory(source, layer, recipe, tokens) for layer in structure.layers)
    end_bytes = max(sum(_bytes(source, [name]) for name in names) for names in (structure.front, structure.back))
    if backward:
        end_bytes += 6 * LOGIT_BYTES  # logits, probabilities, their sums and gradients of one chunk
    memory = PROCESS_BYTES + max(layer_bytes, end_bytes)
    return Estimate(memory, hidden + records, _seconds(source, structure, recipe, tokens))


def _record_bytes(recipe: Recipe, unit: Linear) -> int:
    """Both factors of every rank that the form can store; the codes on every grid, and the factors of its correction."""
    storage, sides = recipe.storage, (unit.d_out + unit.d_in) * unit.dtype.itemsize
    grids = [grid for grid in storage.grids if grid.fits(unit.d_in)]
    corrected = 0 if unit.role in ENDS else max(storage.correction_ranks)
    codes = sum(unit.d_out * unit.d_in * grid.bits // 8 for grid in grids)
    return storage.largest_rank(unit) * sides + codes + len(grids) * corrected * sides


def _bytes(source: Source, names: list[str]) -> int:
    return sum(source.tensor(name).numel() for name in names) * source.compute_dtype.itemsize


def _layer_memory(source: Source, layer: Layer, recipe: Recipe, tokens: int) -> int:
    weights = _bytes(source, source.parameter_names([layer.path]))
    batch = min(tokens, recipe.micro_batch * recipe.sequence_length)
    copies = 4 if recipe.backward else 2
    widths = sum(linear.d_in + linear.d_out for linear in layer.linears)
    activations = copies * batch * widths * source.compute_dtype.itemsize
    moments = 4 * sum(
        group.linears[0].d_in ** 2
        if any(linear.d_in <= linear.d_out for linear in group.linears)
        else sum(linear.d_out**2 for linear in group.linears)
        for group in layer.groups
    )
    largest = max(layer.linears, key=lambda linear: linear.d_in * linear.d_out)
    solving = 8 * (3 * largest.d_in * largest.d_out + 5 * min(largest.d_in, largest.d_out) ** 2)
    if recipe.backward:
        moments += 4 * sum(min(linear.d_in, linear.d_out) ** 2 for linear in layer.linears)
        inputs = sum(group.linears[0].d_in for group in layer.groups)
        outputs = sum(linear.d_out for linear in layer.linears)
        kept = min(SAMPLES, tokens)
        moments += kept * (inputs + outputs) * source.compute_dtype.itemsize
        if recipe.storage.low_rank:
            # both factors in float64 and float32, and the kept tokens along every direction
            solving += 24 * largest.d_in * largest.d_out
            solving += 4 * kept * (largest.d_in + largest.d_out + 3 * min(largest.d_in, largest.d_out))
    if recipe.storage.grids and tokens:
        # both sides in full; their roots in float64, and the weight on as many grids as go together
        moments += sum(4 * group.linears[0].d_in ** 2 for group in layer.groups)
        moments += sum(4 * linear.d_out**2 for linear in layer.linears if recipe.backward)
        solving += 16 * max(max(linear.d_out, linear.d_in) for linear in layer.linears) ** 2
        solving += 4 * max(TOGETHER, largest.d_in * largest.d_out)
    return weights + max(activations, solving) + (moments if tokens else 0)


def _seconds(source: Source, structure: Structure, recipe: Recipe, tokens: int) -> float:
    backward = recipe.backward
    passes = SEQUENTIAL_PASSES if recipe.mode == "sequential" else BACKWARD_PASSES if backward else 1.0
    flops = 2.0 * tokens * passes * sum(linear.d_in * linear.d_out for linear in structure.linears)
    squares = sum(
        min(group.linears[0].d_in, group.linears[0].d_out) ** 2 for layer in structure.layers for group in layer.groups
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
        sides += sum(linear.d_out**2 for linear in structure.linears) if backward else 0
        flops += 1.0 * tokens * sides  # half of a product: symmetric
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
        + 2.0 * tokens * squares * (2 if backward else 1) / _flops_per_second(torch.float32)
        + solving / _flops_per_second(torch.float64)
        + quantizing
        + reading
    )


def _quantizing_seconds(recipe: Recipe, linear: Linear) -> float:
    """Of the steps that no matrix product hides: a column of a block of rows at a time, and the search for scales."""
    weights, grids = linear.d_out * linear.d_in, len(recipe.storage.grids)
    blocks, passes = 1, grids
    if QUANTIZERS[recipe.quantizer].outputs:
        blocks, passes = -(-linear.d_out // ROWS), -(-grids // max(1, TOGETHER // weights))
    return COLUMN_SECONDS * passes * blocks * linear.d_in + SEARCH_SECONDS * grids * weights


def _flops_per_second(dtype: torch.dtype, size: int = 512, repeats: int = 3) -> float:
    """This machine's speed in a small matrix product."""
    a = torch.ones(size, size, dtype=dtype)
    a @ a
    started = time.perf_counter()
    for _ in range(repeats):
        a @ a
    return 2.0 * size**3 * repeats / (time.perf_counter() - started)
