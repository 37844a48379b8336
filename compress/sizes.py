"""What a choice of ranks weighs: the four numbers that every report gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache

from calibration.roles import CONSUMER, PRODUCERS
from calibration.structure import Linear
from checkpoint.errors import UserError
from checkpoint.forms import FORMS, Spec
from compress.allocations import ALLOCATIONS, Curve, Unreachable


@dataclass(frozen=True)
class Sizes:
    """Ratios are kept / dense; bytes are of tensors, tied ones once, file headers aside.

    ``effective_rank_reduction`` is ranks removed / all ranks (WeLore's ERR, which is no ratio of parameters).
    """

    decoder_linear_parameters: float
    model_parameters: float
    model_bytes: float
    bits_per_decoder_weight: float
    effective_rank_reduction: float
    bytes_before: int
    bytes_after: int
    achieved_ratio: float

    def as_dict(self) -> dict[str, float | int]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Collected:
    """What collecting found out: losses at every rank, singular values and sensitivities by linear, influence by layer.

    ``tokens`` is how many the losses are means over.
    """

    loss: Mapping[str, tuple[float, ...]]
    spectrum: Mapping[str, tuple[float, ...]]
    sensitivity: Mapping[str, tuple[float, ...]]
    influence: Mapping[int, float]
    tokens: int


NOTHING = Collected({}, {}, {}, {}, 1)


@dataclass(frozen=True)
class Storage:
    """How compressed linears are stored: their form, whether those without a bias are given one, whether channels go.

    ``prunes_channels``: the feed-forward network loses channels, which has forms of its own; a rank is then their number.
    """

    form: str
    adds_bias: bool = False
    prunes_channels: bool = False

    def form_of(self, linear: Linear) -> str:
        """The form in which a linear is stored."""
        if self.prunes_channels and linear.role in PRODUCERS:
            return "output-channels"
        return "input-channels" if self.prunes_channels and linear.role == CONSUMER else self.form

    def spec(self, linear: Linear, rank: int) -> Spec:
        """How a linear is stored at a rank."""
        return Spec(self.form_of(linear), rank)

    def bias_of(self, linear: Linear, rank: int) -> int:
        """Elements of a compressed linear's bias."""
        if FORMS[self.form_of(linear)].prunes_outputs:
            return rank if linear.has_bias else 0
        return linear.d_out if linear.has_bias or self.adds_bias else 0

    def _more_bias(self, linear: Linear, rank: int) -> int:
        return self.bias_of(linear, rank) - (linear.d_out if linear.has_bias else 0)

    def nbytes(self, linear: Linear, rank: int | None) -> int:
        """Bytes at a rank (None is dense, 0 is removed), counting what the bias grows or shrinks by."""
        if not rank:
            return 0 if rank == 0 else linear.nbytes
        size = self.spec(linear, rank).nbytes(linear.d_out, linear.d_in, linear.dtype.itemsize)
        return size + self._more_bias(linear, rank) * linear.dtype.itemsize

    def parameters(self, linear: Linear, rank: int | None) -> int:
        """Parameters at a rank; None is dense, 0 is removed."""
        if not rank:
            return 0 if rank == 0 else linear.d_out * linear.d_in
        stored = self.spec(linear, rank).parameters(linear.d_out, linear.d_in)
        return stored + self._more_bias(linear, rank)

    def curve(self, linear: Linear, collected: Collected = NOTHING) -> Curve:
        """The linear as the allocation sees it."""
        sizes = _rank_sizes(self, replace(linear, name="", local="", layer=0))
        return Curve(
            linear.nbytes,
            sizes,
            collected.loss.get(linear.name, ())[: len(sizes)],
            collected.spectrum.get(linear.name, ()),
            linear.layer,
            linear.role,
            collected.tokens,
            collected.influence.get(linear.layer),
            collected.sensitivity.get(linear.name, ()),
        )

    def largest_rank(self, linear: Linear) -> int:
        """The largest rank that is stored in fewer bytes than the dense weight (0: none is)."""
        return self.curve(linear).largest


@cache
def _rank_sizes(storage: Storage, shape: Linear) -> tuple[int, ...]:
    """Bytes at rank 0, 1, ... up to the largest that saves; once for all linears of a shape, of which a model has few."""
    sizes = [0]
    for rank in range(1, min(shape.d_out, shape.d_in)):
        size = storage.nbytes(shape, rank)
        if size >= shape.nbytes:
            break
        sizes.append(size)
    return tuple(sizes)


def budget_for(linears: Sequence[Linear], model_bytes: int, ratio: float, scope: str) -> int:
    """Bytes left for the decoder's linears at a target ratio; may be negative."""
    dense = sum(linear.nbytes for linear in linears)
    return int(ratio * dense) if scope == "decoder" else int(ratio * model_bytes) - (model_bytes - dense)


def choose_ranks(
    linears: Sequence[Linear],
    model_bytes: int,
    ratio: float,
    scope: str,
    allocation: str,
    storage: Storage,
    collected: Collected = NOTHING,
) -> dict[str, int | None]:
    """Rank (None: dense) per linear for a target ratio; ``collected`` is what the allocation reads.

    Raises UserError naming the smallest ratio that can be reached where this one cannot.
    """
    budget = budget_for(linears, model_bytes, ratio, scope)
    widths = pruned_widths(linears, storage, budget) if storage.prunes_channels else {}
    others = [linear for linear in linears if linear.name not in widths]
    spent = sum(storage.nbytes(linear, widths[linear.name]) for linear in linears if linear.name in widths)
    curves = [storage.curve(linear, collected) for linear in others]
    try:
        ranks = ALLOCATIONS[allocation].choose(curves, budget - spent)
    except Unreachable as problem:
        dense = sum(linear.nbytes for linear in linears)
        smallest = (
            (problem.smallest + spent) / dense
            if scope == "decoder"
            else (model_bytes - dense + problem.smallest + spent) / model_bytes
        )
        raise UserError(
            f"--target-ratio {ratio:g} cannot be reached with --ratio-scope {scope}: everything else is kept, so the smallest is "
            f"{smallest + 5e-4:.3f}"
        ) from problem
    return widths | {linear.name: rank for linear, rank in zip(others, ranks, strict=True)}


def pruned_widths(linears: Sequence[Linear], storage: Storage, budget: int) -> dict[str, int | None]:
    """Channels to keep of every feed-forward linear: the budget's fraction of them, the same in every layer.

    Raises UserError where the roles of the linears do not tell what the feed-forward network is.
    """
    fraction = min(max(budget / sum(linear.nbytes for linear in linears), 0.0), 1.0)
    widths: dict[str, int | None] = {}
    for index in sorted({linear.layer for linear in linears}):
        layer = [linear for linear in linears if linear.layer == index]
        producers = [linear for linear in layer if linear.role in PRODUCERS]
        consumers = [linear for linear in layer if linear.role == CONSUMER]
        channels = consumers[0].d_in if len(consumers) == 1 else 0
        if not producers or not channels or any(linear.d_out % channels for linear in producers):
            raise UserError(
                f"layer {index} has no feed-forward network whose channels could be pruned "
                f"({', '.join(f'{item.local}: {item.role}' for item in layer)}); choose another recipe"
            )
        kept = max(int(fraction * channels), 1)
        widths |= {linear.name: kept * (linear.d_out // channels) for linear in producers}
        widths[consumers[0].name] = kept
    return widths


def measure(
    linears: Sequence[Linear],
    ranks: Mapping[str, int | None],
    storage: Storage,
    model_bytes: int,
    model_parameters: int,
    scope: str,
    removed: tuple[int, int] = (0, 0),
) -> Sizes:
    """The sizes of a choice of ranks; ``removed`` are bytes and parameters that go with removed layers' linears."""
    dense_parameters = sum(linear.d_out * linear.d_in for linear in linears)
    dense_bytes = sum(linear.nbytes for linear in linears)
    kept_parameters = sum(storage.parameters(linear, ranks[linear.name]) for linear in linears)
    kept_bytes = sum(storage.nbytes(linear, ranks[linear.name]) for linear in linears)
    full = {linear.name: min(linear.d_out, linear.d_in) for linear in linears}
    kept_ranks = sum(full[name] if rank is None else min(rank, full[name]) for name, rank in ranks.items())
    after = model_bytes - dense_bytes + kept_bytes - removed[0]
    return Sizes(
        decoder_linear_parameters=kept_parameters / dense_parameters,
        model_parameters=(model_parameters - dense_parameters + kept_parameters - removed[1]) / model_parameters,
        model_bytes=after / model_bytes,
        bits_per_decoder_weight=8 * kept_bytes / dense_parameters,
        effective_rank_reduction=1.0 - kept_ranks / sum(full.values()),
        bytes_before=model_bytes,
        bytes_after=after,
        achieved_ratio=kept_bytes / dense_bytes if scope == "decoder" else after / model_bytes,
    )
