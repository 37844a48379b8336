"""The least that each stage of a run has to do: bytes, floating-point operations and eigendecompositions, from shapes alone.

Counted is what the methods as published (compress/ has their papers) and the promise of one layer in memory ask for, not what
the code does: one pass over a layer whatever the groups, symmetric products by half, triangular ones by their triangle, every
matrix decomposed once and on its smaller side. Left out: normalisation, activation functions and other work on single
numbers, the search for scales, hashes, tokenising, starting the process.

Where the allocation chooses by losses, what is written and installed is that of the plan's uniform stand-in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from machine import CHOLESKY, Machine

from calibration.ends import HEAD_TOKENS
from calibration.gram import has_bfloat16_products
from calibration.moments import OF_ACTIVATIONS, moment_bytes
from calibration.roles import CONSUMER
from calibration.structure import Group, Layer, Linear
from calibration.sweep import SAMPLES
from checkpoint.forms import Grid, Spec
from compress.allocations import ALLOCATIONS
from compress.allocations.sensitivity import RATIOS
from compress.children import CHECK_TOKENS
from compress.methods import METHODS, NATS
from compress.plan import Plan
from compress.quantizers import QUANTIZERS

SINGLE, DOUBLE = "float32", "float64"
ATTENTION_OUTPUT = "attention output"  # the role of the linear that reads what all heads give


@dataclass(frozen=True)
class Work:
    """Bytes read and written; FLOPs by dtype (and ``cholesky``); how many eigendecompositions of which side."""

    reads: float = 0.0
    writes: float = 0.0
    flops: Counter[str] = field(default_factory=Counter)
    eigen: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: Work) -> Work:
        flops, eigen = self.flops + other.flops, self.eigen + other.eigen
        return Work(self.reads + other.reads, self.writes + other.writes, flops, eigen)

    def eigen_seconds(self, machine: Machine) -> float:
        """Of all eigendecompositions."""
        return sum(count * machine.eigen_seconds(side) for side, count in self.eigen.items())

    def seconds(self, machine: Machine) -> float:
        """The longer of arithmetic and disk."""
        arithmetic = sum(flops / machine.flops[kind] for kind, flops in self.flops.items())
        disk = self.reads / machine.reading + self.writes / machine.writing
        return max(arithmetic + self.eigen_seconds(machine), disk)


def work(plan: Plan) -> dict[str, Work]:
    """What each stage of a run has to do."""
    stages, recipe = _Stages(plan), plan.recipe
    reads = ALLOCATIONS[recipe.allocation].reads
    found = {"tokenising": stages.tokenising(), "verifying weights": Work(reads=plan.source.nbytes)}
    if recipe.mode == "one-shot" or reads:
        if recipe.backward:
            found |= {"forward": stages.forward(), "loss gradient": stages.loss_gradient()}
            found["backward"] = stages.backward() + stages.menus()
            if recipe.packs_ends:
                found["ends"] = stages.ends()
        elif "influence" in recipe.needs:
            found["block influence"] = stages.forward()
        else:
            found["decomposing"] = stages.forward() + stages.moments(stages.groups, stages.tokens, 0) + stages.menus()
        if "sensitivity" in reads:
            found["searching"] = stages.searching()
    if recipe.walks:
        found["walking"] = stages.walking()
    return found | {"writing": stages.writing(), "checking": stages.checking()}


def _flops(**kinds: float) -> Work:
    return Work(flops=Counter(kinds))


class _Stages:
    def __init__(self, plan: Plan) -> None:
        self.plan, self.source, self.structure, self.recipe = plan, plan.source, plan.structure, plan.recipe
        self.storage, self.method = plan.recipe.storage, METHODS[plan.recipe.decomposition]
        native = self.source.compute_dtype == torch.bfloat16 and has_bfloat16_products()
        self.kind = "bfloat16" if native else SINGLE  # of everything that is made of activations
        self.groups = [group for layer in self.structure.layers for group in layer.groups]
        length = self.recipe.sequence_length
        self.tokens = self.recipe.calibration_tokens // length * length if self.recipe.needs else 0
        self.gradient_tokens = self.recipe.gradient_windows * length if self.recipe.backward else 0
        self.samples = min(SAMPLES, self.gradient_tokens)
        itemsize = self.source.compute_dtype.itemsize
        width = min(group.linears[0].d_in for group in self.structure.layers[0].groups)
        self.state = width * itemsize  # bytes of a token's hidden state, or of the gradient at it
        self.decoder = self.stored([layer.path for layer in self.structure.layers])
        self.back = self.stored(self.structure.back)
        # of the embedding no more rows than there are tokens
        self.front = min(self.stored(self.structure.front), self.tokens * self.state)
        self.head = sum(self.source.tensor(name).numel() for name in self.structure.back)

    def stored(self, paths: Iterable[str]) -> float:
        """Bytes on disk of the parameters under the paths; a tied one is that which it is tied to."""
        names = {self.source.tied.get(name, name) for name in self.source.parameter_names(paths)}
        return sum(self.source.tensor(name).numel() * self.source.stored_dtype(name).itemsize for name in names)

    def run(self, parameters: float, tokens: float) -> Work:
        """A product of tokens with parameters: a multiplication and an addition each."""
        return _flops(**{self.kind: 2.0 * parameters * tokens})

    def attention(self, layers: Iterable[Layer], tokens: float) -> Work:
        """Scores and values of all heads: two products with the half of the window's other tokens that comes before."""
        heads = sum(item.d_in for layer in layers for item in layer.linears if item.role == ATTENTION_OUTPUT)
        return self.run(2.0 * heads * self.recipe.sequence_length / 2, tokens)

    def layers(self, layers: Iterable[Layer], tokens: float) -> Work:
        """A forward pass through layers."""
        some = list(layers)
        weights = sum(item.d_out * item.d_in for layer in some for item in layer.linears)
        return self.run(weights, tokens) + self.attention(some, tokens)

    # stages

    def tokenising(self) -> Work:
        """A token is at least a byte of text, and the tokenizer is a file; nothing is read where no text is needed."""
        tokenizer = self.source.directory / "tokenizer.json"
        size = tokenizer.stat().st_size if tokenizer.is_file() else 0
        return Work(reads=self.tokens + size if self.tokens else 0)

    def forward(self) -> Work:
        """Every layer once over all tokens; each layer's input is a file: memory does not grow with tokens.

        Of tokens that will not go backward the moments of activations are made on the way, and are files too.
        """
        layers = self.structure.layers
        states = self.tokens * self.state * len(layers)
        work = self.layers(layers, self.tokens) + Work(self.decoder + self.front + states, states)
        if self.recipe.backward and self.gradient_tokens < self.tokens:
            work += self.moments(self.groups, self.tokens - self.gradient_tokens, 0) + Work(writes=self.kept_sums())
        return work

    def kept_sums(self) -> float:
        """Bytes of the sums that a forward pass keeps for the backward one."""
        return torch.float32.itemsize * sum(
            self.summed(group, self.recipe.needs & OF_ACTIVATIONS) for group in self.groups
        )

    def loss_gradient(self) -> Work:
        """The head there and back over the tokens that go backward: logits, and the gradient at its input."""
        states = self.gradient_tokens * self.state
        return self.run(2.0 * self.head, self.gradient_tokens) + Work(self.back + states, states)

    def backward(self) -> Work:
        """Every layer's forward again (its activations are not kept), the gradient at each linear's input, and the moments.

        No gradient of a weight is made; attention takes two products for each of its own on the way back.
        """
        layers = self.structure.layers
        weights = sum(item.d_out * item.d_in for item in self.structure.linears)
        back = self.run(weights, self.gradient_tokens)
        for _ in range(2):
            back += self.attention(layers, self.gradient_tokens)
        tokens = self.gradient_tokens
        states = tokens * self.state * len(layers)
        sums = self.kept_sums() if tokens < self.tokens else 0.0
        disk = Work(self.decoder + 2.0 * states + sums, states)
        return self.layers(layers, tokens) + back + self.moments(self.groups, tokens, tokens) + disk

    def moments(self, groups: Iterable[Group], tokens: float, gradient_tokens: float) -> Work:
        """Every number that is summed takes a multiplication and an addition a token, and half of a symmetric matrix is enough."""
        total = Work()
        for group in groups:
            forward = self.summed(group, self.recipe.needs & OF_ACTIVATIONS)
            gradients = self.summed(group, self.recipe.needs) - forward
            total += _flops(**{self.kind: tokens * forward + gradient_tokens * gradients})
        return total

    def summed(self, group: Group, needs: frozenset[str]) -> float:
        """The numbers that are summed for a group."""
        sizes = {item.local: (item.d_out, item.d_in) for item in group.linears}
        return sum(moment_bytes(sizes, needs, 0, 0).values()) / torch.float32.itemsize

    def menus(self) -> Work:
        """Of every linear all that its menu needs, and its record: products at every rank, or what is chosen of integers."""
        total = Work()
        for group in self.groups:
            specs = {item: self.storage.menu(item) for item in group.linears}
            rounded = any(spec.weight for menu in specs.values() for spec in menu)
            total += self.shared_root(group) if rounded else Work()
            for linear, menu in specs.items():
                rank = self.storage.largest_rank(linear) if self.storage.low_rank else 0
                if rank:
                    total += self.decomposing(linear, rank, self.at_input(group))
                total += self.products_on_grids(linear, menu) + self.rounding(linear, menu)
                choice = self.plan.choices[linear.name]
                chosen = self.storage.nbytes(linear, choice) if choice else 0
                factors = rank * (linear.d_out + linear.d_in) * linear.dtype.itemsize
                total += Work(writes=factors or chosen)
        return total

    def at_input(self, group: Group) -> bool:
        """Whether the group's second moment is that of its input (as calibration.moments has it)."""
        return "input" in self.recipe.needs or any(item.d_in <= item.d_out for item in group.linears)

    def decomposing(self, linear: Linear, rank: int, at_input: bool) -> Work:
        """Factors along ``rank`` directions: a moment on the smaller side, its eigenvectors, the products that make factors of them.

        ``W W^T`` or ``W^T W`` (half); ``W C W^T`` (a whole, then a half product) where the moment is the input's, nothing where it was
        summed at the output or is the pulled gradient's. A second weight is a triangular root: factorised, multiplied from both
        sides (half, and half of a half), and taken out of one factor and put into the other.
        """
        d_out, d_in, needs = linear.d_out, linear.d_in, self.method.needs
        side, whole, tall = min(d_out, d_in), float(d_out * d_in), d_in < d_out
        gradient, second = "gradient" in needs, "second" in needs
        if tall:
            products = 0.0 if gradient else whole * side
        else:
            products = whole * side if not second else (2.0 * d_in + d_out) * whole if at_input else 0.0
        rank = side if "samples" in needs else rank  # what is dropped is measured direction by direction
        products += 2.0 * whole * rank
        total = _flops(**{DOUBLE: products}) + Work(eigen=Counter({side: 1}))
        if gradient or (second and tall):
            total += _flops(**{CHOLESKY: side**3 / 3, DOUBLE: 1.5 * side**3 + 2.0 * side**2 * rank})
        return total + (self.sampled(linear, side) if "samples" in needs else Work())

    def sampled(self, linear: Linear, rank: int) -> Work:
        """Each direction's loss on the sampled tokens: both factors are run, in float32."""
        return _flops(**{SINGLE: 2.0 * self.samples * (linear.d_out + linear.d_in) * rank})

    def products_on_grids(self, linear: Linear, menu: Iterable[Spec]) -> Work:
        """Losses of products with rounded factors: what the weight does to the samples, and what the factors do."""
        rank = max((spec.rank for spec in menu if spec.weight is None and spec.factors), default=0)
        return self.run(linear.d_out * linear.d_in, self.samples) + self.sampled(linear, rank) if rank else Work()

    def shared_root(self, group: Group) -> Work:
        """The root of the input's moment, which all linears and grids of a group share.

        Factorised, and not inverted: fed back from the columns that are done, errors give the same codes (LDLQ: Chee et al. 2023,
        arXiv 2307.13304).
        """
        side = group.linears[0].d_in if QUANTIZERS[self.recipe.quantizer].inputs else 0
        return _flops(**{CHOLESKY: side**3 / 3})

    def rounding(self, linear: Linear, specs: Iterable[Spec]) -> Work:
        """Codes on every grid of ``specs``, corrections of the highest rank there, and their losses."""
        d_out, d_in, needs = linear.d_out, linear.d_in, self.method.needs
        whole, quantizer = float(d_out * d_in), QUANTIZERS.get(self.recipe.quantizer)
        ranks: dict[Grid, int] = {}
        for spec in specs:
            if spec.weight:
                ranks[spec.weight] = max(spec.rank, ranks.get(spec.weight, 0))
        if not ranks or quantizer is None:
            return Work()
        # the root of the outputs' moment: once for all grids
        total = _flops(**{CHOLESKY: d_out**3 / 3 if quantizer.outputs else 0.0})
        for rank in ranks.values():
            # each weight is divided and rounded; each error reaches all later columns, and all later rows: halves of a product
            codes = 2.0 + d_in * quantizer.inputs + d_out * quantizer.outputs
            # a direction is one product with the error and with each weighting there, and one back; no matrix need be made of it
            weighted = 2.0 * (d_in**2 * ("second" in needs) + d_out**2 * ("gradient" in needs))
            times = 2 if rank and self.recipe.alternations else 1  # quantized again at least once
            total += _flops(**{SINGLE: times * (codes * whole + rank * (4.0 * whole + weighted))})
            if self.method.unit == NATS:  # what the error does to the samples, and what its correction does
                total += self.run(whole, self.samples) + self.sampled(linear, rank)
        return total

    def ends(self) -> Work:
        """Embedding and head on every grid: their moment, its root, the rounding, and the logits that tell what each costs."""
        total = Work(reads=2.0 * self.gradient_tokens * self.state)
        few = min(HEAD_TOKENS, self.tokens)
        for end in self.structure.ends:
            menu = self.storage.menu(end)
            if not menu:
                continue
            whole, tied = float(end.d_out * end.d_in), f"{end.name}.weight" in self.source.tied.values()
            total += _flops(**{CHOLESKY: end.d_in**3 / 3, SINGLE: len(menu) * whole * (2.0 + end.d_in)})
            if end.role == "head" or tied:  # one more run of the head: the dense one
                total += self.run(whole, few * (len(menu) + 1)) + self.run(end.d_in**2 / 2, few)
            if end.role == "embedding":
                total += self.run(end.d_in**2 / 2, self.gradient_tokens)
            choice = self.plan.choices[end.name]
            total += Work(end.nbytes, self.storage.nbytes(end, choice) if choice else 0)
        return total

    def searching(self) -> Work:
        """One linear at one ratio after the other: its layer, the layers behind it, and the head, on the search's tokens."""
        recipe, layers, total = self.recipe, self.structure.layers, Work()
        tokens = max(1, recipe.search_tokens // recipe.sequence_length) * recipe.sequence_length
        for layer in layers:
            behind = layers[layer.index :]
            copies = float(min(tokens, self.tokens) * len(RATIOS) * len(layer.linears))
            states = copies * self.state * len(behind)
            weights = self.stored([item.path for item in behind]) + self.back
            total += self.layers(behind, copies) + self.run(self.head, copies) + Work(weights + states, states)
        return total

    def walking(self) -> Work:
        """Every group is decomposed as planned on what the compressed model sees, and then run as it is stored.

        The dense layer runs too where a whole layer's statistics come before its compression, or its outputs are refitted to; a
        dense linear where the moment is that of its output.
        """
        recipe, layers, storage = self.recipe, self.structure.layers, self.storage
        ready, refits = recipe.mode == "one-shot", recipe.refit != "none"
        anchored = recipe.refit == "anchored"
        states = self.tokens * self.state * len(layers) * (2 if anchored else 1)
        total = Work(self.decoder + self.front + states, states) + self.attention(layers, self.tokens)
        for _ in range((recipe.mode == "layerwise") + anchored):
            total += self.layers(layers, self.tokens)
        for group in self.groups:
            planned = {item: self.plan.spec(item) for item in group.linears}
            if not ready and any(planned.values()):
                total += self.moments([group], self.tokens, 0)
            if not ready and any(spec and spec.weight for spec in planned.values()):
                total += self.shared_root(group)
            for linear, spec in planned.items():
                choice = self.plan.choices[linear.name]
                total += self.run(storage.parameters(linear, choice), self.tokens)
                if spec is None:
                    continue
                nbytes = storage.nbytes(linear, choice)
                total += Work(nbytes if ready else 0, nbytes)
                by_output = "second" in recipe.needs and not self.at_input(group)
                if recipe.mode == "sequential" and by_output:
                    total += self.run(linear.d_out * linear.d_in, self.tokens)
                if not ready and spec.weight:
                    total += self.rounding(linear, [spec])
                elif not ready and not storage.prunes(linear):
                    total += self.decomposing(linear, spec.rank, self.at_input(group))
                if refits and (not storage.prunes(linear) or linear.role == CONSUMER):
                    total += self.refitting(linear, spec.rank, anchored)
        return total

    def refitting(self, linear: Linear, rank: int, anchored: bool) -> Work:
        """Targets and inner outputs against one another and the latter against themselves (half), then one solution.

        The inner outputs come from the compressed layer's run, the targets of ``anchored`` from the dense one's.
        """
        products = 2.0 * linear.d_out * rank + rank**2
        targets = 0.0 if anchored else 2.0 * linear.d_out * linear.d_in
        solving = _flops(**{CHOLESKY: rank**3 / 3, DOUBLE: 2.0 * linear.d_out * rank**2})
        return _flops(**{self.kind: self.tokens * (products + targets)}) + solving

    def writing(self) -> Work:
        """What is written was recorded, or is the source's; a product loses its redundancy, or becomes a dense weight."""
        size = float(self.plan.sizes.bytes_after)
        total = Work(size, size)
        for linear in self.structure.linears:
            spec = self.plan.spec(linear)
            if spec is None or spec.weight or spec.factors or self.storage.prunes(linear):
                continue
            if self.recipe.export == "dense":
                total += _flops(**{SINGLE: 2.0 * linear.d_out * linear.d_in * spec.rank})
            elif spec.form == "pivoted":
                # rows by elimination, the coefficients of the others, and those rows of the product
                d_out, square = linear.d_out, float(spec.rank**2)
                rows = square * (d_out - spec.rank / 3) + square * (d_out - spec.rank) + 2.0 * square * linear.d_in
                total += _flops(**{DOUBLE: rows})
        return total

    def checking(self) -> Work:
        """A few tokens through what was recorded and through what was written: each is read once."""
        weights = sum(item.d_out * item.d_in for item in self.structure.linears) + self.head
        return self.run(2.0 * weights, CHECK_TOKENS) + Work(reads=2.0 * self.plan.sizes.bytes_after)
