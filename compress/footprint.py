"""Peak memory of every stage of a run, from shapes alone: what is held together, added up.

Checked against runs by ``benchmarks/memory.py``. Two things bring a peak down: fewer windows at a time, and more passes over
a layer, each of which collects the moments of some of its linears only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch

from calibration import attention
from calibration.ends import END_ROWS
from calibration.gram import ROWS as GRAM_ROWS
from calibration.gram import rows_at_a_time
from calibration.labels import logit_tokens
from calibration.moments import OF_ACTIVATIONS, moment_bytes
from calibration.roles import ENDS
from calibration.structure import Group, Layer, Linear, Structure
from calibration.sweep import SAMPLES
from checkpoint import processes
from checkpoint.errors import UserError
from checkpoint.memory import PROCESS_BYTES
from checkpoint.shards import PIECE
from checkpoint.source import Source
from compress.allocations import ALLOCATIONS
from compress.parallel import FEW
from compress.quantizers import QUANTIZERS
from compress.quantizers.gptq import EXACT
from compress.quantizers.two_sided import grids_together
from compress.recipe import Recipe

HEADROOM = 1.03  # the state of the heap moves a peak by so much from run to run
SINGLE, DOUBLE = 4, 8  # bytes of a float
# bytes a weight whose scale is searched, and of how many weights the heap keeps them: measured
SEARCHING, KEPT = 64, 1 << 20
HEAP = 40_000_000  # what the layers left in small blocks, when the ends come last: measured (make demo)
# what small linears, several at a time, leave between one another in the heap, in copies of the weight; and bytes: measured (SmolLM2)
SIDE_BY_SIDE, MOST_LEFT = 12, 80_000_000
KERNELS = 25_000_000  # what the library of products keeps of attention's shapes: measured
TEXT = 30_000_000  # a piece of text, its tokens, and what the tokenizer remembers: measured
TOKENIZER = 12  # bytes in memory for one in tokenizer.json: measured


@dataclass(frozen=True)
class Footprint:
    """What a stage holds at its peak besides the process (and its tokenizer): bytes by what they are, and where that is."""

    stage: str
    where: str
    holds: Mapping[str, int]
    process: int = PROCESS_BYTES

    @property
    def nbytes(self) -> int:
        """All of it, with the process."""
        return int(HEADROOM * (self.process + sum(self.holds.values())))

    def __str__(self) -> str:
        held = ", ".join(f"{what} {size / 1e6:.0f} MB" for what, size in self.holds.items())
        return f"{self.stage} at {self.where}: the process {self.process / 1e6:.0f} MB, {held}"


def footprints(source: Source, structure: Structure, recipe: Recipe, passes: int = 1) -> list[Footprint]:
    """The peak of every stage of a run, in order."""
    shapes = _Shapes(source, structure, recipe, passes)
    largest = max(source.used_tensors(), key=lambda item: item.nbytes)
    found = [
        Footprint("tokenising", recipe.calibration, {"text": TEXT}),
        Footprint("verifying weights", largest.key, {"tensor": 3 * min(largest.nbytes, PIECE)}),
    ]
    reads = ALLOCATIONS[recipe.allocation].reads
    if recipe.mode == "one-shot" or reads:
        if recipe.backward:
            found += [shapes.forward(), shapes.loss_gradient(), shapes.backward()]
            found += [shapes.ends()] if recipe.packs_ends else []
        else:
            influence = "influence" in recipe.needs
            found.append(shapes.through("block influence" if influence else "decomposing", collects=not influence))
        if "sensitivity" in reads:
            found.append(shapes.through("searching", collects=False))
    if recipe.walks:
        found.append(shapes.through("walking", collects=True))
    found += [shapes.output("writing"), shapes.output("checking")]
    tokenizer = source.directory / "tokenizer.json"
    process = (
        PROCESS_BYTES
        + KERNELS * (shapes.scores(False) > 0)
        + (TOKENIZER * tokenizer.stat().st_size if tokenizer.is_file() else 0)
    )
    return [replace(item, process=process) for item in found]


def within(source: Source, structure: Structure, recipe: Recipe, limit: int | None) -> tuple[Recipe, int]:
    """The recipe with as many windows at a time as ``limit`` bytes allow, and the passes over a layer.

    Fewer windows cost less time than more passes, and are tried first. Raises UserError naming what does not fit.
    """
    tried = footprints(source, structure, recipe)
    most_passes = max(len(_together(layer)) for layer in structure.layers) if recipe.mode != "sequential" else 1
    passes = 1
    while limit is not None and max(item.nbytes for item in tried) > limit:
        if recipe.micro_batch > 1 and recipe.needs:
            recipe = replace(recipe, micro_batch_tokens=recipe.micro_batch // 2 * recipe.sequence_length)
        elif passes < most_passes:
            passes += 1
        else:
            largest = max(tried, key=lambda item: item.nbytes)
            raise UserError(
                f"--memory-limit {limit / 1e9:.2f}GB is too little: {largest.nbytes / 1e9:.2f} GB are needed ({largest}); "
                "raise it, or ask for a smaller --sequence-length"
            )
        tried = footprints(source, structure, recipe, passes)
    return recipe, passes


def in_passes(layer: Layer, recipe: Recipe, passes: int) -> list[tuple[Linear, ...]]:
    """The linears of a layer in ``passes`` runs of neighbours (or fewer), the largest run's moments as small as can be."""
    groups = [(group, _moments(group, recipe, SINGLE)) for group in layer.groups]
    sizes = {linear.local: of_group for group, of_group in groups for linear in group.linears}
    together = _together(layer)

    def held(run: Iterable[Sequence[Linear]]) -> int:
        """What its linears share with their groups is there once."""
        of_groups = [(linear.local, sizes[linear.local]) for linears in run for linear in linears]
        shared = {id(of_group): of_group[""] for _, of_group in of_groups}
        return sum(shared.values()) + sum(of_group[local] for local, of_group in of_groups)

    def runs(most: int) -> list[list[tuple[Linear, ...]]]:
        found: list[list[tuple[Linear, ...]]] = [[]]
        for item in together:
            if found[-1] and held([*found[-1], item]) > most:
                found.append([])
            found[-1].append(item)
        return found

    ends = range(1, len(together) + 1)
    totals = sorted({held(together[first:last]) for last in ends for first in range(last)})
    least = max(held([item]) for item in together)
    fits = [most for most in totals if most >= least]
    most = fits[bisect_left(fits, True, key=lambda most: len(runs(most)) <= passes)]
    return [tuple(linear for linears in run for linear in linears) for run in runs(most)]


def _together(layer: Layer) -> list[tuple[Linear, ...]]:
    """The linears of a layer one by one, but all experts of a mixture as one: those with few tokens are lent the others' moments."""
    found: list[tuple[Linear, ...]] = []
    for linear in layer.linears:
        if linear.mixture and found and found[-1][-1].mixture:
            found[-1] = (*found[-1], linear)
        else:
            found.append((linear,))
    return found


def kept_sums(group: Group, recipe: Recipe) -> dict[str, int]:
    """Bytes of the sums of a group's activations that a forward pass keeps for the backward one, as ``_moments`` has them."""
    if recipe.gradient_windows >= recipe.windows:
        return {"": 0, **{linear.local: 0 for linear in group.linears}}
    sizes = {linear.local: (linear.d_out, linear.d_in) for linear in group.linears}
    return moment_bytes(sizes, recipe.needs & OF_ACTIVATIONS, 0, 0)


def _moments(group: Group, recipe: Recipe, itemsize: int) -> dict[str, int]:
    """Bytes of the moments and samples of a group: of all (``""``), and of each linear's own by its name."""
    sizes = {linear.local: (linear.d_out, linear.d_in) for linear in group.linears}
    # of an expert's rows those are touched that come to it: twice its share, where the router is uneven
    rows = ceil(2 * group.linears[0].share * recipe.gradient_windows * recipe.sequence_length)
    return moment_bytes(sizes, recipe.needs, SAMPLES if group.linears[0].share == 1 else min(SAMPLES, rows), itemsize)


def record_bytes(recipe: Recipe, unit: Linear) -> int:
    """Both factors of every rank that the form can store; the codes on every grid, and the factors of its correction."""
    storage, sides = recipe.storage, (unit.d_out + unit.d_in) * unit.dtype.itemsize
    grids = [grid for grid in storage.grids if grid.fits(unit.d_in)]
    corrected = 0 if unit.role in ENDS else max(storage.correction_ranks)
    codes = sum(unit.d_out * unit.d_in * grid.bits // 8 for grid in grids)
    return storage.largest_rank(unit) * sides + codes + len(grids) * corrected * sides


def _of(sizes: Mapping[str, int], linears: Iterable[Linear]) -> dict[str, int]:
    """Those of some linears, and what they share (``""``)."""
    names = {"", *(linear.local for linear in linears)}
    return {name: size for name, size in sizes.items() if name in names}


class _Shapes:
    def __init__(self, source: Source, structure: Structure, recipe: Recipe, passes: int) -> None:
        self.source, self.structure, self.recipe, self.passes = source, structure, recipe, passes
        self.itemsize, self.converts = source.compute_dtype.itemsize, source.source_dtype != source.compute_dtype
        # bytes of every parameter, stored and loaded
        self.sizes = {
            name: (tensor.numel() * source.stored_dtype(name).itemsize, tensor.numel() * self.itemsize)
            for name, tensor in source.model.state_dict().items()
        }
        self.width = min(group.linears[0].d_in for group in structure.layers[0].groups)
        self.tokens = recipe.micro_batch * recipe.sequence_length if recipe.needs else 0
        vocabulary = source.config.get_text_config().vocab_size
        self.logits = SINGLE * vocabulary * min(logit_tokens(vocabulary), recipe.sequence_length)

    def weights(self, paths: Iterable[str], as_stored: bool = False) -> int:
        """Of the parameters under the paths, loaded to be run, or to be written."""
        wanted = tuple(paths)
        under = [name for name in self.sizes if name in wanted or name.startswith(tuple(path + "." for path in wanted))]
        sizes = [self.sizes[name] for name in {self.source.tied.get(name, name) for name in under}]
        stored, loaded = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
        # where the dtype is another both are there while a layer is loaded
        return stored if as_stored else loaded + (stored if self.converts else 0)

    def activations(self, layer: Layer, backward: bool) -> int:
        """Of a micro-batch in a layer: what its linears give, residuals and norms in float32; for autograd, what they read too."""
        # what experts give is gathered and weighed, and is there twice
        outputs = ceil(sum(linear.d_out * linear.share * (2 if linear.mixture else 1) for linear in layer.linears))
        numbers = self.itemsize * (outputs + 4 * self.width) + SINGLE * 2 * self.width
        if backward:
            inputs = ceil(sum(group.linears[0].d_in * group.linears[0].share for group in layer.groups))
            numbers += self.itemsize * (2 * outputs + inputs) + SINGLE * 4 * self.width
        return self.tokens * (numbers + self.scores(backward))

    def scores(self, backward: bool) -> int:
        """Of attention by products: a block of rows' scores, which become probabilities; under autograd those of all blocks stay."""
        config, length = self.source.config.get_text_config(), self.recipe.sequence_length
        if config._attn_implementation != attention.NAME or length < attention.SHORTEST:
            return 0
        row = config.num_attention_heads * length * self.itemsize
        return row if backward else row // attention.BLOCKS

    def end(self, paths: Sequence[str], stage: str) -> Footprint:
        """Of the embedding, or the head, while they run."""
        return Footprint(stage, paths[0], {"weights": self.weights(paths)})

    def through(self, stage: str, collects: bool) -> Footprint:
        """Layer by layer forward, decomposing where ``collects``."""
        found = [self.end(self.structure.front, stage)] if self.tokens else []
        for layer in self.structure.layers:
            weights = self.weights([layer.path])
            found.append(
                Footprint(stage, layer.path, {"weights": weights, "activations": self.activations(layer, False)})
            )
            if collects:
                found += self.collecting(stage, layer, weights, backward=False)
        return _largest(found)

    def forward(self) -> Footprint:
        """Layer by layer forward, where a backward pass follows: sums of what does not go backward are made on the way."""
        found = [self.through("forward", collects=False)]
        for layer in self.structure.layers:
            for linears in in_passes(layer, self.recipe, self.passes):
                groups = [group for group in layer.groups if set(group.linears) & set(linears)]
                kept = sum(sum(_of(kept_sums(group, self.recipe), linears).values()) for group in groups)
                parts = {"weights": self.weights([layer.path]), "moments": kept}
                parts["activations"] = self.activations(layer, False) + bool(kept) * self.converted(layer)
                found.append(Footprint("forward", layer.path, parts))
        return _largest(found)

    def converted(self, layer: Layer) -> int:
        """Of rows in float32, to be summed."""
        widest = max(max(linear.d_in, linear.d_out) for linear in layer.linears)
        rows = min(rows_at_a_time(widest), self.recipe.micro_batch * self.recipe.sequence_length)
        return 2 * SINGLE * rows * widest

    def loss_gradient(self) -> Footprint:
        """The head on a chunk of tokens, forward and backward."""
        weights = self.weights(self.structure.back)
        window = SINGLE * 4 * self.recipe.sequence_length * self.width
        held = {"weights": weights, "logits": 6 * self.logits, "states": window}
        return Footprint("loss gradient", self.structure.back[-1], held)

    def backward(self) -> Footprint:
        """Layer by layer under autograd, decomposing."""
        return _largest(
            item
            for layer in self.structure.layers
            for item in self.collecting("backward", layer, self.weights([layer.path]), backward=True)
        )

    def collecting(self, stage: str, layer: Layer, weights: int, backward: bool) -> list[Footprint]:
        """A layer's moments being summed, and each of its linears being decomposed, largest first, as the driver does it."""
        recipe, found = self.recipe, list[Footprint]()
        every, aside = sum(record_bytes(recipe, linear) for linear in layer.linears), stage != "walking"
        if aside:  # each is on disk until all are written together
            found.append(Footprint(stage, layer.path, {"record": every}))
        records = every if aside and processes.count() > 1 else 0  # what the others have found is in memory
        rounds = in_passes(layer, recipe, self.passes)
        if stage == "walking" and recipe.mode != "layerwise":
            rounds = [group.linears for group in layer.groups]
        summing = self.activations(layer, backward) + self.converted(layer)
        for linears in rounds:
            held = {group: self.held(group, linears) for group in layer.groups if set(group.linears) & set(linears)}
            moments = sum(sum(sizes.values()) for sizes in held.values())
            parts = {"weights": weights, "moments": moments, "records": records, "activations": summing}
            if self.tokens:
                found.append(Footprint(stage, layer.path, parts))
            groups = {linear: group for group in held for linear in group.linears}
            few = sum(linear.d_out * linear.d_in <= FEW for linear in linears)
            for linear in sorted(linears, key=lambda item: item.d_out * item.d_in, reverse=True):
                small = linear.d_out * linear.d_in <= FEW
                at_a_time = min(torch.get_num_threads(), few) if small else 1
                solving = at_a_time * (self.solving(linear) + (record_bytes(recipe, linear) if aside else 0))
                solving += self.left(linear) if at_a_time > 1 else 0
                parts = {"weights": weights, "moments": moments, "records": records, "solving": solving}
                found.append(Footprint(stage, linear.name, parts))
                records += 0 if aside else record_bytes(self.recipe, linear)
                moments -= held[groups[linear]].pop(linear.local)
                if list(held[groups[linear]]) == [""]:
                    moments -= held[groups[linear]].pop("")
        return found

    def held(self, group: Group, linears: Iterable[Linear]) -> dict[str, int]:
        """Bytes of the moments of some of a group's linears, and of what they share (``""``)."""
        return _of(_moments(group, self.recipe, self.itemsize), linears)

    def left(self, linear: Linear) -> int:
        """What small linears, several at a time, leave in the heap when they are as large as this one."""
        return min(SIDE_BY_SIDE * DOUBLE * linear.d_out * linear.d_in, MOST_LEFT)

    def solving(self, linear: Linear) -> int:
        """Of what is made on the way from a linear's moments to its record."""
        storage = self.recipe.storage
        low_rank = self.decomposing(linear) if storage.low_rank else 0
        return max(low_rank, self.quantizing(linear) if storage.grids else 0)

    def decomposing(self, linear: Linear) -> int:
        """The smaller side's eigenvectors in float64, and the factors along all of them."""
        whole, side = linear.d_out * linear.d_in, min(linear.d_out, linear.d_in)
        samples = "samples" in self.recipe.needs
        copies = 3 if samples else 4 if linear.d_in < linear.d_out else 2
        return DOUBLE * (copies * whole + 6 * side**2) + self.sampling(linear)

    def quantizing(self, linear: Linear) -> int:
        """Codes on every grid; and the roots of the moments, or the weight on as many grids as go together, or errors and their factors."""
        whole, side, recipe = linear.d_out * linear.d_in, min(linear.d_out, linear.d_in), self.recipe
        grids = [grid for grid in recipe.storage.grids if grid.fits(linear.d_in)]
        two_sided = QUANTIZERS[recipe.quantizer].outputs
        squares = linear.d_in**2 + (linear.d_out**2 if two_sided else 0)
        together = (SINGLE + 1) * min(len(grids), grids_together(whole)) if two_sided else 4 * SINGLE
        rounding = SINGLE * (2 * whole + squares) + together * whole
        widest = max(linear.d_in, linear.d_out if two_sided else 0)
        roots = SINGLE * ((3 if widest <= EXACT else 1) * widest**2 + whole)
        candidates = len(grids) if recipe.mode == "one-shot" else 1
        correcting = DOUBLE * (self.copies(linear) * whole + 4 * side**2) + SINGLE * whole + self.sampling(linear)
        # what the search for scales leaves is in small blocks, which the heap keeps
        searching = SEARCHING * min(KEPT, whole)
        return (DOUBLE + candidates) * whole + searching + max(roots, rounding, correcting)

    def copies(self, linear: Linear) -> int:
        """Of the weight, or of its error, in float64 while its factors are made."""
        if "samples" in self.recipe.needs:
            return 2
        return 4 if linear.d_in < linear.d_out else 3

    def sampling(self, linear: Linear) -> int:
        """Of a batch of samples, through the linear and its factors; and the factors in float32."""
        if "samples" not in self.recipe.needs:
            return 0
        return SINGLE * 3 * GRAM_ROWS * (linear.d_out + linear.d_in)

    def ends(self) -> Footprint:
        """The largest of embedding and head on every grid, and the logits that tell what it costs."""
        loaded = max(self.weights(self.structure.front), self.weights(self.structure.back))
        found = []
        for end in self.structure.ends:
            whole = end.d_out * end.d_in
            held = {
                "weights": loaded + 2 * whole * (end.dtype.itemsize + 1),
                "records": sum(record_bytes(self.recipe, item) for item in self.structure.ends),
                "scales": SEARCHING * min(KEPT, whole),
                "heap": max(HEAP, *(self.left(linear) for linear in self.structure.linears)),
                "rows or logits": max(7 * self.logits, SINGLE * 8 * min(END_ROWS, end.d_out) * end.d_in),
            }
            found.append(Footprint("ends", end.name, held))
        return _largest(found)

    def output(self, stage: str) -> Footprint:
        """A layer and its record while it is written, or run to be compared; and the ends."""
        found = []
        part = 4 * (DOUBLE if self.recipe.storage.form == "pivoted" else SINGLE)
        for layer in self.structure.layers:
            weights = self.weights([layer.path], as_stored=stage == "writing")
            weights *= 2 if stage == "checking" else 1  # the compressed ones beside their own
            for linear in layer.linears:
                # a record's file is mapped: its pages count besides the tensors read from it
                held = {"weights": weights, "record": 2 * record_bytes(self.recipe, linear)}
                found.append(Footprint(stage, linear.name, held | {"part": part * linear.d_out * linear.d_in}))
        for end in self.structure.ends:
            whole = end.d_out * end.d_in
            held = {"weights": self.weights([end.name], as_stored=stage == "writing")}
            if self.recipe.packs_ends:
                held |= {"record": 2 * record_bytes(self.recipe, end), "part": (1 + end.dtype.itemsize) * whole}
            found.append(Footprint(stage, end.name, held))
        return _largest(found)


def _largest(found: Iterable[Footprint]) -> Footprint:
    return max(found, key=lambda item: item.nbytes)
