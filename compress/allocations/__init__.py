"""The table of allocations: from a byte budget to a rank for every linear. Pure functions of sizes, losses and spectra.

To add one: a file beside this with a function of ``(curves, budget)`` that returns a rank per linear (None: dense), and a
line in ``ALLOCATIONS`` saying what it reads: ``loss`` (the decomposition's curves), ``spectrum`` (the weight's singular values),
``influence`` (of a layer on the hidden states), ``sensitivity`` (of the model to the linear).
Any allocation of ranks goes with any decomposition: ``--allocation NAME``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compress.allocations.attention_types import attention_types
from compress.allocations.block_influence import block_influence
from compress.allocations.curve import Curve, Ranks, Unreachable
from compress.allocations.last_modules import last_modules
from compress.allocations.pooled import pooled
from compress.allocations.sensitivity import sensitivity
from compress.allocations.truncation_loss import truncation_loss
from compress.allocations.uniform import uniform
from compress.allocations.welore import welore

__all__ = ["ALLOCATIONS", "Allocation", "Curve", "Ranks", "Unreachable"]


@dataclass(frozen=True)
class Allocation:
    """An allocation, and what of the curves it reads that is known only after collecting.

    ``plans_itself``: it takes the same bytes whatever it reads, so the plan before collecting is its own too.
    """

    choose: Callable[[Sequence[Curve], int], Ranks]
    reads: frozenset[str] = frozenset()
    plans_itself: bool = False


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(uniform),
    "last-modules": Allocation(last_modules),
    "attention-types": Allocation(attention_types),
    "welore": Allocation(welore, frozenset({"spectrum"})),
    "truncation-loss": Allocation(truncation_loss, frozenset({"loss"})),
    "pooled": Allocation(pooled, frozenset({"loss"})),
    "sensitivity": Allocation(sensitivity, frozenset({"sensitivity"})),
    "block-influence": Allocation(block_influence, frozenset({"influence"}), plans_itself=True),
}
