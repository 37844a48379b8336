"""The table of decompositions.

To add one: write a file beside this with one function of ``(weight, moments, rank, damping)`` that returns
``Factors``, name the moments it needs, and add a line to ``METHODS``; then a recipe in configs/.

``weight`` is ``(d_out, d_in)`` float64; ``moments`` holds what ``needs`` names (``second``: the smaller side's
second moment, ``mean_absolute``: the input's, ``gradient``: the loss gradient's second moment on the smaller
side, ``samples``: some tokens' own inputs and gradients); ``rank`` is how many directions to keep; ``damping``
is the multiple of the mean input power added to the moment's diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from calibration.moments import Moments
from compress.methods.asvd import asvd
from compress.methods.svd import svd
from compress.methods.two_sided import two_sided
from compress.methods.whitened import whitened
from compress.parts import Factors

NATS = "nats per token"
Decompose = Callable[[torch.Tensor, Moments, int, float], Factors]


@dataclass(frozen=True)
class Method:
    """A decomposition, the moments that it needs, and the unit of its losses."""

    decompose: Decompose
    needs: frozenset[str]
    unit: str = "squared output error per token"


METHODS: dict[str, Method] = {
    "svd": Method(svd, frozenset()),
    "asvd": Method(asvd, frozenset({"mean_absolute"})),
    "svd-llm": Method(whitened, frozenset({"second"})),
    "llm-rom": Method(whitened, frozenset({"second"})),
    "two-sided": Method(two_sided, frozenset({"second", "gradient", "samples"}), unit=NATS),
}
