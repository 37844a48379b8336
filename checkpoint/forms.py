"""The ways in which a compressed linear is stored: a table of forms, each with its tensors' shapes and its module.

To add one: a module in modeling_template.py (it is what users load), its line in ``MODULES`` there, and a line in ``FORMS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from checkpoint.modeling_template import MODULES, grid_shapes

# name inside the module -> dtype (None: the dense weight's own) and shape
Stored = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]


@dataclass(frozen=True)
class Grid:
    """Integers of ``bits`` 2 to 8; ``group_size`` neighbouring inputs of a row share a scale, 0: the whole row does.

    Asymmetric groups have a zero point too. ``power_of_two``: scales are powers of two and take a byte (the shared
    exponents of MXINT, LQER arXiv 2402.02446).
    """

    bits: int
    group_size: int = 0
    symmetric: bool = True
    power_of_two: bool = False

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def fits(self, d_in: int) -> bool:
        """Whether the groups divide a row; a group as wide as the row is the whole row, which is another grid."""
        return self.group_size == 0 or (self.group_size < d_in and d_in % self.group_size == 0)

    def groups(self, d_in: int) -> int:
        """Groups in a row."""
        return 1 if self.group_size == 0 else d_in // self.group_size


@dataclass(frozen=True)
class Spec:
    """How one linear is stored, as config.json says it.

    ``rank`` is that of the product, of a packed weight's correction (0: none), or the number of channels that are kept;
    ``weight`` is the grid of a packed weight, ``factors`` that of the factors (None: the weight's own dtype).
    """

    form: str
    rank: int
    weight: Grid | None = None
    factors: Grid | None = None

    def as_dict(self) -> dict[str, Any]:
        """For config.json."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def stored(self, d_out: int, d_in: int) -> Stored:
        """Names, dtypes and shapes of what is stored for a weight ``(d_out, d_in)``."""
        return FORMS[self.form].stored(self, d_out, d_in)

    def nbytes(self, d_out: int, d_in: int, itemsize: int) -> int:
        """Bytes stored for a weight of ``itemsize`` bytes an element; the bias is not counted."""
        return sum(
            torch.Size(shape).numel() * (dtype.itemsize if dtype else itemsize)
            for dtype, shape in self.stored(d_out, d_in).values()
        )

    def parameters(self, d_out: int, d_in: int) -> int:
        """Numbers that multiply inputs: quantization makes them no fewer; scales, zero points and indices are none."""
        plain = replace(self, weight=None, factors=None)
        return sum(torch.Size(shape).numel() for dtype, shape in plain.stored(d_out, d_in).values() if dtype is None)


class Part(Protocol):
    """What stands in for a linear's weight."""

    @property
    def spec(self) -> Spec:
        """How it is stored."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``."""
        ...

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors to store, by their names inside the module."""
        ...

    def dense(self) -> torch.Tensor:
        """The weight that the part stands for, as a stock architecture of its size holds it."""
        ...

    def bias(self, old: torch.Tensor | None) -> torch.Tensor | None:
        """The bias of the linear once the part stands in it; ``old`` is what it had."""
        ...


@dataclass(frozen=True)
class Form:
    """``stored(spec, d_out, d_in)`` says what is stored; ``bias`` is the name under which a bias goes in the module.

    ``prunes_outputs``: only ``rank`` of the outputs are left, and so of the bias.
    """

    stored: Callable[[Spec, int, int], Stored]
    bias: str
    prunes_outputs: bool = False


def linear_stored(name: str, d_out: int, d_in: int, grid: Grid | None) -> Stored:
    """What a plain or a packed linear ``(d_out, d_in)`` stores, every name after ``name``."""
    if grid is None:
        return {f"{name}weight": (None, (d_out, d_in))}
    return {f"{name}{key}": value for key, value in grid_shapes(d_out, d_in, asdict(grid)).items()}


def _factors(spec: Spec, d_out: int, d_in: int, separator: str = ".") -> Stored:
    inner = linear_stored(f"factor_in{separator}", spec.rank, d_in, spec.factors)
    return inner | linear_stored(f"factor_out{separator}", d_out, spec.rank, spec.factors)


def _pivoted(spec: Spec, d_out: int, d_in: int) -> Stored:
    return _factors(spec, d_out - spec.rank, d_in) | {"order": (torch.int32, (d_out,))}


def _packed(spec: Spec, d_out: int, d_in: int) -> Stored:
    return linear_stored("", d_out, d_in, spec.weight) | (_factors(spec, d_out, d_in, "_") if spec.rank else {})


def _output_channels(spec: Spec, d_out: int, d_in: int) -> Stored:
    return {"weight": (None, (spec.rank, d_in))}


def _input_channels(spec: Spec, d_out: int, d_in: int) -> Stored:
    return {"weight": (None, (d_out, spec.rank))}


FORMS: dict[str, Form] = {
    "factors": Form(_factors, bias="factor_out.bias"),
    "pivoted": Form(_pivoted, bias="bias"),
    "packed": Form(_packed, bias="bias"),
    "output-channels": Form(_output_channels, bias="bias", prunes_outputs=True),
    "input-channels": Form(_input_channels, bias="bias"),
}


def stored_module(part: Part, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The module that the checkpoint will hold, in ``dtype``, for use while calibrating."""
    d_out, d_in = part.shape
    changed = part.bias(bias)
    module: nn.Module = MODULES[part.spec.form](d_in, d_out, part.spec.as_dict(), changed is not None, device="meta")
    return _filled(module, dict(part.tensors()), FORMS[part.spec.form].bias, changed, dtype)


def multiplied_out(part: Part, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The stock module that ``--export dense`` will hold, in ``dtype``."""
    weight, changed = part.dense(), part.bias(bias)
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=changed is not None, device="meta")
    return _filled(module, {"weight": weight}, "bias", changed, dtype)


def _filled(
    module: nn.Module, state: dict[str, torch.Tensor], bias_name: str, bias: torch.Tensor | None, dtype: torch.dtype
) -> nn.Module:
    if bias is not None:
        state[bias_name] = bias.detach()
    cast = {name: item.to(dtype) if item.is_floating_point() else item for name, item in state.items()}
    module.load_state_dict(cast, assign=True)
    return module.requires_grad_(False)
