"""What a choice of ranks weighs: the four numbers that every report gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from calibration.structure import Linear
from checkpoint.errors import UserError
from checkpoint.forms import FORMS
from compress.allocate import ALLOCATIONS, Curve, Unreachable


@dataclass(frozen=True)
class Sizes:
    """Ratios are kept / dense; bytes are of tensors, tied ones once, file headers aside."""

    decoder_linear_parameters: float
    model_parameters: float
    model_bytes: float
    bits_per_decoder_weight: float
    bytes_before: int
    bytes_after: int
    achieved_ratio: float

    def as_dict(self) -> dict[str, float | int]:
        """For JSON."""
        return asdict(self)


def curve_of(linear: Linear, form: str, loss: tuple[float, ...] = ()) -> Curve:
    """A linear, stored in ``form``, as the allocation sees it."""
    return Curve(linear.nbytes, FORMS[form].sizes(linear.d_out, linear.d_in, linear.dtype.itemsize), loss)


def largest_rank(linear: Linear, form: str) -> int:
    """The largest rank that ``form`` stores in fewer bytes than the dense weight (0: none is)."""
    return curve_of(linear, form).largest


def rank_nbytes(linear: Linear, form: str, rank: int | None) -> int:
    """Bytes at a rank; None is dense."""
    if rank is None:
        return linear.nbytes
    return FORMS[form].nbytes(rank, linear.d_out, linear.d_in, linear.dtype.itemsize)


def rank_parameters(linear: Linear, form: str, rank: int | None) -> int:
    """Parameters at a rank; None is dense."""
    dense = linear.d_out * linear.d_in
    return dense if rank is None else FORMS[form].parameters(rank, linear.d_out, linear.d_in)


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
    form: str,
    losses: Mapping[str, tuple[float, ...]] | None = None,
) -> dict[str, int | None]:
    """Rank (None: dense) per linear for a target ratio; ``losses`` where the allocation reads them.

    Raises UserError naming the smallest ratio that can be reached where this one cannot.
    """
    budget = budget_for(linears, model_bytes, ratio, scope)
    curves = [curve_of(linear, form, (losses or {}).get(linear.name, ())) for linear in linears]
    try:
        ranks = ALLOCATIONS[allocation].choose(curves, budget)
    except Unreachable as problem:
        dense = sum(linear.nbytes for linear in linears)
        smallest = (
            problem.smallest / dense if scope == "decoder" else (model_bytes - dense + problem.smallest) / model_bytes
        )
        raise UserError(
            f"--target-ratio {ratio:g} cannot be reached with --ratio-scope {scope}: everything else is kept, so the smallest is "
            f"{smallest + 5e-4:.3f}"
        ) from problem
    return {linear.name: rank for linear, rank in zip(linears, ranks, strict=True)}


def measure(
    linears: Sequence[Linear],
    ranks: Mapping[str, int | None],
    form: str,
    model_bytes: int,
    model_parameters: int,
    scope: str,
) -> Sizes:
    """The sizes of a choice of ranks."""
    dense_parameters = sum(linear.d_out * linear.d_in for linear in linears)
    dense_bytes = sum(linear.nbytes for linear in linears)
    kept_parameters = sum(rank_parameters(linear, form, ranks[linear.name]) for linear in linears)
    kept_bytes = sum(rank_nbytes(linear, form, ranks[linear.name]) for linear in linears)
    after = model_bytes - dense_bytes + kept_bytes
    return Sizes(
        decoder_linear_parameters=kept_parameters / dense_parameters,
        model_parameters=(model_parameters - dense_parameters + kept_parameters) / model_parameters,
        model_bytes=after / model_bytes,
        bits_per_decoder_weight=8 * kept_bytes / dense_parameters,
        bytes_before=model_bytes,
        bytes_after=after,
        achieved_ratio=kept_bytes / dense_bytes if scope == "decoder" else after / model_bytes,
    )
