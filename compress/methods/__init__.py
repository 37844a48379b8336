"""The table of decompositions.

To add one: write a file beside this with one function of ``(weight, moments, rank, damping)`` that returns
``Factors``, name the moments it needs, and add a line to ``METHODS``; then a recipe in configs/.

``weight`` is ``(d_out, d_in)`` float64; ``moments`` holds what ``needs`` names (``second``: the smaller side's second moment;
``mean``, ``mean_absolute``, ``mean_square``: the input channels'; ``gradient``: the loss gradient's second moment on the
smaller side; ``row_fisher``: each row's; ``samples``: some tokens' own inputs and gradients); ``rank`` is how many directions
to keep; ``damping`` is the multiple of the mean input power added to the moment's diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from calibration.moments import Moments
from compress.methods.afm import afm
from compress.methods.asvd import asvd
from compress.methods.awsvd import awsvd
from compress.methods.fwsvd import fwsvd
from compress.methods.l2qer import l2qer
from compress.methods.svd import svd
from compress.methods.two_sided import correction, two_sided
from compress.methods.whitened import whitened
from compress.parts import Factors

NATS = "nats per token"
Decompose = Callable[[torch.Tensor, Moments, int, float], Factors]


@dataclass(frozen=True)
class Method:
    """A decomposition, the moments that it needs, the unit of its losses, and what runs where its bias has no place.

    None decomposes nothing: for allocations that remove whole layers. ``of_error`` makes up for an error of quantization, whose loss is
    measured with its correction: None is ``decompose`` itself.
    """

    decompose: Decompose | None
    needs: frozenset[str] = frozenset()
    unit: str = "squared output error per token"
    without_bias: Decompose | None = None
    of_error: Decompose | None = None

    @property
    def changes_bias(self) -> bool:
        """Whether its optimum includes a bias."""
        return self.without_bias is not None

    @property
    def backward(self) -> bool:
        """Whether a backward pass is needed."""
        return bool(self.needs & {"gradient", "row_fisher", "samples"})


METHODS: dict[str, Method] = {
    "none": Method(None, frozenset({"influence"})),
    "svd": Method(svd),
    "asvd": Method(asvd, frozenset({"mean_absolute"})),
    "l2qer": Method(l2qer, frozenset({"mean_absolute"})),
    "awsvd": Method(awsvd, frozenset({"mean_square"})),
    "fwsvd": Method(fwsvd, frozenset({"row_fisher"}), unit="squared Fisher-weighted error"),
    "svd-llm": Method(whitened, frozenset({"second"})),
    "llm-rom": Method(whitened, frozenset({"second"})),
    "afm": Method(afm, frozenset({"second", "mean"}), without_bias=whitened),
    "two-sided": Method(two_sided, frozenset({"second", "gradient", "samples"}), unit=NATS, of_error=correction),
}
