"""Every way in which a recipe may store a linear, in order of size: an allocation chooses one for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from calibration.roles import CONSUMER, ENDS, PRODUCERS
from calibration.structure import Linear
from checkpoint.forms import FORMS, Grid, Spec

DIRECTIONS = 64  # neighbouring ones of a product with quantized factors, which share scales: any cut there is a slice
REMOVED = 0  # a choice: nothing is left, not even one of rank one; None is dense, any other an index into the menu


@dataclass(frozen=True)
class Storage:
    """How compressed linears may be stored: their form, whether those without a bias are given one, whether channels go.

    ``low_rank``: products of every rank, in ``form``, are on the menu. ``grids``: so are packed weights on these, each with a
    correction of each of ``correction_ranks`` (0: none) whose factors are on ``factor_grid`` (None: the weight's dtype; else
    products with both factors in so many bits are on the menu too, ``DIRECTIONS`` by ``DIRECTIONS``).
    ``prunes_channels``: the feed-forward network loses channels, which has forms of its own; a choice is then their number.
    """

    form: str
    adds_bias: bool = False
    prunes_channels: bool = False
    low_rank: bool = True
    grids: tuple[Grid, ...] = ()
    correction_ranks: tuple[int, ...] = (0,)
    factor_grid: Grid | None = None

    def prunes(self, linear: Linear) -> bool:
        """Whether the linear loses channels."""
        return self.prunes_channels and (linear.role in PRODUCERS or linear.role == CONSUMER)

    def spec(self, linear: Linear, choice: int) -> Spec:
        """How a linear is stored: ``choice`` is an index into its menu, or the number of channels that it keeps."""
        if self.prunes(linear):
            return Spec("input-channels" if linear.role == CONSUMER else "output-channels", choice)
        return self.menu(linear)[choice - 1]

    def menu(self, linear: Linear) -> tuple[Spec, ...]:
        """All that is smaller than the dense weight; choice 1 is the smallest."""
        return tuple(spec for spec, _ in _menu(self, _shape(linear)))

    def sizes(self, linear: Linear) -> tuple[int, ...]:
        """Bytes of nothing, and of everything on the menu."""
        return (0, *(size for _, size in _menu(self, _shape(linear))))

    def bias_of(self, linear: Linear, spec: Spec) -> int:
        """Elements of a compressed linear's bias."""
        if FORMS[spec.form].prunes_outputs:
            return spec.rank if linear.has_bias else 0
        return linear.d_out if linear.has_bias or self.adds_bias else 0

    def _more_bias(self, linear: Linear, spec: Spec) -> int:
        return self.bias_of(linear, spec) - (linear.d_out if linear.has_bias else 0)

    def spec_bytes(self, linear: Linear, spec: Spec) -> int:
        """Bytes of a linear so stored, counting what the bias grows or shrinks by."""
        size = spec.nbytes(linear.d_out, linear.d_in, linear.dtype.itemsize)
        return size + self._more_bias(linear, spec) * linear.dtype.itemsize

    def nbytes(self, linear: Linear, choice: int | None) -> int:
        """Bytes of a choice."""
        if choice is None:
            return linear.nbytes
        return 0 if choice == REMOVED else self.spec_bytes(linear, self.spec(linear, choice))

    def parameters(self, linear: Linear, choice: int | None) -> int:
        """Parameters of a choice; quantization makes them no fewer."""
        if choice is None:
            return linear.d_out * linear.d_in
        if choice == REMOVED:
            return 0
        spec = self.spec(linear, choice)
        return spec.parameters(linear.d_out, linear.d_in) + self._more_bias(linear, spec)

    def kept_rank(self, linear: Linear, choice: int | None) -> int:
        """The rank of what stands for the weight."""
        full = min(linear.d_out, linear.d_in)
        if choice is None or choice == REMOVED:
            return full if choice is None else 0
        spec = self.spec(linear, choice)
        return full if spec.form == "packed" else min(spec.rank, full)

    def largest_rank(self, linear: Linear) -> int:
        """The largest rank of a product that is stored in fewer bytes than the dense weight (0: none is)."""
        return max((spec.rank for spec in self.menu(linear) if spec.weight is None), default=0)


def _shape(linear: Linear) -> Linear:
    """The linear without what tells it from others of its shape."""
    return replace(linear, name="", local="", layer=0, mixture="", share=1.0)


@cache
def _menu(storage: Storage, shape: Linear) -> tuple[tuple[Spec, int], ...]:
    """The menu with its bytes; once for all linears of a shape, of which a model has few."""
    sized = ((spec, storage.spec_bytes(shape, spec)) for spec in _every(storage, shape))
    return tuple(sorted((item for item in sized if item[1] < shape.nbytes), key=lambda item: item[1]))


def _every(storage: Storage, shape: Linear) -> Iterator[Spec]:
    full = min(shape.d_out, shape.d_in)
    if shape.role in ENDS:
        yield from (Spec("packed", 0, grid) for grid in storage.grids if grid.fits(shape.d_in))
        return
    if storage.low_rank:
        yield from (Spec(storage.form, rank) for rank in range(1, full))
    if storage.low_rank and storage.factor_grid:
        grid = replace(storage.factor_grid, group_size=DIRECTIONS)
        several = range(2 * DIRECTIONS, full if grid.fits(shape.d_in) else 0, DIRECTIONS)
        yield from (Spec("factors", rank, factors=grid) for rank in several)
    for grid in storage.grids:
        if grid.fits(shape.d_in):
            ranks = (rank for rank in storage.correction_ranks if rank < full)
            yield from (Spec("packed", rank, grid, storage.factor_grid if rank else None) for rank in ranks)
