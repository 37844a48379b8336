"""The table of quantizers.

To add one: a file beside this with a function of ``(weight, grids, inputs, outputs, damping, dtype)`` that returns a ``Quantized`` per grid
(what grids share is made once), and a line in ``QUANTIZERS`` with the moments it needs. ``weight`` is ``(d_out, d_in)``; ``inputs`` the
input's second moment ``(d_in, d_in)`` or None, ``outputs`` that of the loss gradient at the output ``(d_out, d_out)`` or None;
``damping`` is the multiple of the mean diagonal that is added to ``inputs``; ``dtype`` is that in which scales are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from checkpoint.forms import Grid
from compress.quantizers.gptq import gptq
from compress.quantizers.grid import Quantized
from compress.quantizers.rounding import round_to_nearest
from compress.quantizers.two_sided import two_sided_rounding

__all__ = ["QUANTIZERS", "Grid", "Quantized", "Quantizer"]

Quantize = Callable[
    [torch.Tensor, Sequence[Grid], torch.Tensor | None, torch.Tensor | None, float, torch.dtype], list[Quantized]
]


@dataclass(frozen=True)
class Quantizer:
    """How codes are found, and of which sides the second moments are needed."""

    quantize: Quantize
    inputs: bool = False
    outputs: bool = False


QUANTIZERS: dict[str, Quantizer] = {
    "rtn": Quantizer(round_to_nearest),
    "gptq": Quantizer(gptq, inputs=True),
    "two-sided": Quantizer(two_sided_rounding, inputs=True, outputs=True),
}
