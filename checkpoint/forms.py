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

    @property
    def shift(self) -> torch.Tensor | None:
        """What is added to the bias, ``(d_out,)``; None: nothing."""
        ...

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors to store, by their names inside the module."""
        ...

    def dense(self) -> torch.Tensor:
        """The product ``(d_out, d_in)``."""
        ...


@dataclass(frozen=True)
class Form:
    """``stored(rank, d_out, d_in)`` says what is stored; ``bias`` is the name under which a bias goes in the module."""

    stored: Callable[[int, int, int], Stored]
    bias: str

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


FORMS: dict[str, Form] = {
    "factors": Form(_factors, bias="factor_out.bias"),
    "pivoted": Form(_pivoted, bias="bias"),
}


def shifted_bias(part: Part, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The bias of the linear once ``part`` stands in it, in ``dtype``; None if it has none."""
    if part.shift is None:
        return None if bias is None else bias.detach().to(dtype)
    return (part.shift if bias is None else bias.detach().double() + part.shift).to(dtype)


def stored_module(part: Part, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The module that the checkpoint will hold, in ``dtype``, for use while calibrating."""
    d_out, d_in = part.shape
    shifted = shifted_bias(part, bias, dtype)
    module: nn.Module = MODULES[part.form](d_in, d_out, part.rank, shifted is not None, device="meta")
    state = {name: item.to(dtype) if item.is_floating_point() else item for name, item in part.tensors().items()}
    if shifted is not None:
        state[FORMS[part.form].bias] = shifted
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


def multiplied_out(part: Part, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Module:
    """The stock module that ``--export dense`` will hold, in ``dtype``."""
    d_out, d_in = part.shape
    shifted = shifted_bias(part, bias, dtype)
    module = nn.Linear(d_in, d_out, bias=shifted is not None, device="meta")
    state = {"weight": part.dense().to(dtype)}
    module.load_state_dict(state if shifted is None else {**state, "bias": shifted}, assign=True)
    return module.requires_grad_(False)
