"""The table of quantizers.

To add one: a file beside this with a function of ``(weight, grid, second, damping, dtype)`` that returns ``Quantized``, and a line in
``QUANTIZERS``. ``weight`` is ``(d_out, d_in)``; ``second`` the input's second moment ``(d_in, d_in)`` or None; ``damping`` the multiple
of its mean diagonal that is added to it; ``dtype`` is that in which scales are stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from checkpoint.forms import Grid
from compress.quantizers.gptq import gptq
from compress.quantizers.grid import Quantized
from compress.quantizers.rounding import round_to_nearest

__all__ = ["QUANTIZERS", "Grid", "Quantized"]

Quantize = Callable[[torch.Tensor, Grid, torch.Tensor | None, float, torch.dtype], Quantized]

QUANTIZERS: dict[str, Quantize] = {
    "rtn": round_to_nearest,
    "gptq": gptq,
}
