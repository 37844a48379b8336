"""What the choices weigh: the four numbers that every report gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from calibration.roles import CONSUMER, ENDS, PRODUCERS
from calibration.structure import Linear
from checkpoint.errors import UserError
from compress.allocations import ALLOCATIONS, Curve, Unreachable
from compress.menu import Storage


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
    """What collecting found out: losses of everything on the menu, singular values and sensitivities by linear, influence by layer.

    ``tokens`` is how many the losses are means over.
    """

    loss: Mapping[str, tuple[float, ...]]
    spectrum: Mapping[str, tuple[float, ...]]
    sensitivity: Mapping[str, tuple[float, ...]]
    influence: Mapping[int, float]
    tokens: int


NOTHING = Collected({}, {}, {}, {}, 1)


def curve_of(storage: Storage, linear: Linear, collected: Collected = NOTHING) -> Curve:
    """The linear as the allocation sees it."""
    sizes = storage.sizes(linear)
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


def budget_for(linears: Sequence[Linear], model_bytes: int, ratio: float, scope: str) -> int:
    """Bytes left for the decoder's linears at a target ratio; may be negative."""
    dense = sum(linear.nbytes for linear in linears)
    return int(ratio * dense) if scope == "decoder" else int(ratio * model_bytes) - (model_bytes - dense)


def choose(
    linears: Sequence[Linear],
    model_bytes: int,
    ratio: float,
    scope: str,
    allocation: str,
    storage: Storage,
    collected: Collected = NOTHING,
) -> dict[str, int | None]:
    """A choice from its menu (None: dense) per linear for a target ratio; ``collected`` is what the allocation reads.

    Raises UserError naming the smallest ratio that can be reached where this one cannot.
    """
    budget = budget_for(linears, model_bytes, ratio, scope)
    widths = pruned_widths(linears, storage, budget) if storage.prunes_channels else {}
    others = [linear for linear in linears if linear.name not in widths]
    spent = sum(storage.nbytes(linear, widths[linear.name]) for linear in linears if linear.name in widths)
    curves = [curve_of(storage, linear, collected) for linear in others]
    try:
        choices = ALLOCATIONS[allocation].choose(curves, budget - spent)
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
    return widths | {linear.name: choice for linear, choice in zip(others, choices, strict=True)}


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
    units: Sequence[Linear],
    choices: Mapping[str, int | None],
    storage: Storage,
    model_bytes: int,
    model_parameters: int,
    scope: str,
    removed: tuple[int, int] = (0, 0),
) -> Sizes:
    """The sizes of the choices; ``removed`` are bytes and parameters that go with removed layers' linears."""
    ends = [unit for unit in units if unit.role in ENDS]
    linears = [unit for unit in units if unit.role not in ENDS]
    dense_parameters = sum(linear.d_out * linear.d_in for linear in linears)
    dense_bytes = sum(linear.nbytes for linear in linears)
    kept_parameters = sum(storage.parameters(linear, choices[linear.name]) for linear in linears)
    kept_bytes = sum(storage.nbytes(linear, choices[linear.name]) for linear in linears)
    saved = sum(end.nbytes - storage.nbytes(end, choices[end.name]) for end in ends)
    full = sum(min(linear.d_out, linear.d_in) for linear in linears)
    kept_ranks = sum(storage.kept_rank(linear, choices[linear.name]) for linear in linears)
    after = model_bytes - dense_bytes + kept_bytes - saved - removed[0]
    return Sizes(
        decoder_linear_parameters=kept_parameters / dense_parameters,
        model_parameters=(model_parameters - dense_parameters + kept_parameters - removed[1]) / model_parameters,
        model_bytes=after / model_bytes,
        bits_per_decoder_weight=8 * kept_bytes / dense_parameters,
        effective_rank_reduction=1.0 - kept_ranks / full,
        bytes_before=model_bytes,
        bytes_after=after,
        achieved_ratio=kept_bytes / dense_bytes if scope == "decoder" else after / model_bytes,
    )
