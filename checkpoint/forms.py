"""The ways in which a low-rank linear is stored: a table of forms, each with its tensors' shapes and its module.

To add one: a module in modeling_template.py (it is what users load), its line in ``MODULES`` there, and a line in ``FORMS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from checkpoint.modeling_template import MODULES

# name inside the module -> dtype (None: the dense weight's own) and shape
Stored = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]


class Part(Protocol):
    """What stands in for a linear's weight."""

    @property
    def form(self) -> str:
        """Its key in ``FORMS``."""
        ...

    @property
    def rank(self) -> int:
        """The rank of the product."""
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
    """``stored(rank, d_out, d_in)`` says what is stored; ``bias`` is the name under which a bias goes in the module.

    ``prunes_outputs``: only ``rank`` of the outputs are left, and so of the bias.
    """

    stored: Callable[[int, int, int], Stored]
    bias: str
    prunes_outputs: bool = False

    def nbytes(self, rank: int, d_out: int, d_in: int, itemsize: int) -> int:
        """Bytes at a rank, for a weight of ``itemsize`` bytes an element; the bias is not counted."""
        return sum(
            torch.Size(shape).numel() * (dtype.itemsize if dtype else itemsize)
            for dtype, shape in self.stored(rank, d_out, d_in).values()
        )

    def parameters(self, rank: int, d_out: int, d_in: int) -> int:
        """Numbers of the weight's own dtype at a rank: indices are bytes, but no parameters."""
        stored = self.stored(rank, d_out, d_in).values()
        return sum(torch.Size(shape).numel() for dtype, shape in stored if dtype is None)


def _factors(rank: int, d_out: int, d_in: int) -> Stored:
    return {"factor_in.weight": (None, (rank, d_in)), "factor_out.weight": (None, (d_out, rank))}


def _pivoted(rank: int, d_out: int, d_in: int) -> Stored:
    return {
        "factor_in.weight": (None, (rank, d_in)),
        "factor_out.weight": (None, (d_out - rank, rank)),
        "order": (torch.int32, (d_out,)),
    }


def _output_channels(rank: int, d_out: int, d_in: int) -> Stored:
    return {"weight": (None, (rank, d_in))}


def _input_channels(rank: int, d_out: int, d_in: int) -> Stored:
    return {"weight": (None, (d_out, rank))}


# rank is the rank of the product, or the number of channels that are kept
FORMS: dict[str, Form] = {
    "factors": Form(_factors, bias="factor_out.bias"),
    "pivoted": Form(_pivoted, bias="bias"),
    "output-channels": Form(_output_channels, bias="bias", prunes_outputs=True),
    "input-channels": Form(_input_channels, bias="bias"),
}


def stored_module(part: Part, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The module that the checkpoint will hold, in ``dtype``, for use while calibrating."""
    d_out, d_in = part.shape
    changed = part.bias(bias)
    module: nn.Module = MODULES[part.form](d_in, d_out, part.rank, changed is not None, device="meta")
    return _filled(module, dict(part.tensors()), FORMS[part.form].bias, changed, dtype)


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
