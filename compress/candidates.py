"""What a linear may become on one grid: its codes, the ordered factors that make up for their error, and the loss of it all.

The reconstruction of the error ``E = W - Q`` is any decomposition with E in the weight's place: plain SVD is LQER (arXiv
2402.02446), input channels weighted L2QER, the full second moment EoRA (arXiv 2410.21271) = QERA-exact (arXiv 2410.06040), both
sides our own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from calibration.moments import Moments, sample_batches
from calibration.products import product
from checkpoint.forms import Grid, Spec
from compress.methods import METHODS, NATS
from compress.packing import quantized_factors
from compress.parallel import each
from compress.parts import Factors, LowRank
from compress.quantizers import QUANTIZERS, Quantized


@dataclass(frozen=True)
class Candidate:
    """``loss[r]`` float64 is the decomposition's objective with a correction of rank r; ``correction`` is None at rank 0."""

    weight: Quantized
    correction: Factors | None
    loss: torch.Tensor


@dataclass(frozen=True)
class Quantization:
    """How candidates are made: a quantizer, whether tokens count by their gradients, its damping, and the reconstruction."""

    quantizer: str
    weighted: bool
    quantizer_damping: float
    decomposition: str
    damping: float
    alternations: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """The moments."""
        quantizer = QUANTIZERS[self.quantizer]
        needs = set(METHODS[self.decomposition].needs)
        inputs = "weighted" if self.weighted else "input"
        if "second" in needs:  # at the input: the output's moment is that of W, not of the error
            needs = needs - {"second"} | {inputs}
        if quantizer.inputs:
            needs.add(inputs)
        if quantizer.outputs or "gradient" in needs:  # nor is the gradient pulled back through the error
            needs = needs - {"gradient"} | {"output_gradient"}
        return frozenset(needs)

    def codes(
        self, weight: torch.Tensor, grids: Sequence[Grid], moments: Moments, dtype: torch.dtype
    ) -> list[Quantized]:
        """``weight`` ``(d_out, d_in)`` float64 on each of the grids; scales in ``dtype``."""
        inputs = moments.weighted if self.weighted else moments.input
        quantize = QUANTIZERS[self.quantizer].quantize
        return quantize(weight.float(), grids, inputs, moments.gradient, self.quantizer_damping, dtype)

    def candidates(
        self, weight: torch.Tensor, ranks: Mapping[Grid, int], moments: Moments, dtype: torch.dtype
    ) -> list[Candidate]:
        """``weight`` ``(d_out, d_in)`` float64 on each grid, with a correction of at most so many directions.

        With ``alternations`` the weight is quantized again without what the correction holds of it, and corrected anew, as
        long as the loss falls (LQ-LoRA, Guo et al. 2023, arXiv 2311.12023, algorithm 1).
        """
        every = self.codes(weight, list(ranks), moments, dtype)
        return each(
            lambda item: self._alternated(weight, item, moments, ranks[item.grid], dtype), every, weight.numel()
        )

    def loss_of_all(self, weight: torch.Tensor, moments: Moments) -> float:
        """The objective when nothing is left of ``weight`` ``(d_out, d_in)`` float64: what relative errors relate to.

        Not from samples: a norm behind a linear makes its loss blind to its scale, and to its absence.
        """
        return float(self.factors(weight, moments, 0).loss[0])

    def _alternated(
        self, weight: torch.Tensor, quantized: Quantized, moments: Moments, rank: int, dtype: torch.dtype
    ) -> Candidate:
        found = self._corrected(weight, quantized, moments, rank)
        for _ in range(self.alternations if rank else 0):
            assert found.correction is not None
            low_rank = product(found.correction.a, found.correction.b)
            (again_quantized,) = self.codes(weight - low_rank, [quantized.grid], moments, dtype)
            again = self._corrected(weight, again_quantized, moments, rank)
            if float(again.loss[-1]) >= float(found.loss[-1]):
                break
            found = again
        return found

    def _corrected(self, weight: torch.Tensor, quantized: Quantized, moments: Moments, rank: int) -> Candidate:
        error = weight - quantized.dense().double()
        factors = self.factors(error, moments, rank)
        in_nats = METHODS[self.decomposition].unit == NATS
        loss = sampled_losses(error, factors, moments) if in_nats else factors.loss
        return Candidate(quantized, factors if rank else None, loss)

    def factors(self, error: torch.Tensor, moments: Moments, rank: int) -> Factors:
        """Ordered factors of an error, or of a weight, ``(d_out, d_in)`` float64."""
        method = METHODS[self.decomposition]
        decompose = method.of_error or method.decompose
        assert decompose is not None
        return decompose(error, moments_of_error(moments, self.weighted), rank, self.damping)


def moments_of_error(moments: Moments, weighted: bool) -> Moments:
    """The moments without those that depend on the weight, which an error stands in the place of.

    ``weighted``: the input's is the one in which tokens count by their gradients.
    """
    if not weighted or moments.weighted is None:
        return replace(moments, output=None, pulled=None)
    power = float(moments.weighted.diagonal().mean())
    return replace(moments, output=None, pulled=None, input=moments.weighted, input_power=power)


def quantized_product_losses(
    weight: torch.Tensor, low_rank: LowRank, specs: Collection[Spec], moments: Moments
) -> torch.Tensor:
    """``sampled_losses`` of a weight ``(d_out, d_in)`` float64 as a product with both factors on a grid, for each of ``specs``.

    ``low_rank`` holds the highest rank of them. All have one grid, whose groups divide their ranks: the codes of a lower rank are a
    slice of the highest's.
    """
    (grid,) = {spec.factors for spec in specs if spec.factors}
    rounded = quantized_factors(low_rank, grid)
    a, b = rounded.a.dense().to(weight.device), rounded.b.dense().to(weight.device)
    # from the highest rank down, a direction back at a time: what is left of a weight at last is too small a difference
    taken_back = Factors(-a.flip(1), b.flip(0), torch.empty(0))
    losses = sampled_losses(weight - product(a, b).double(), taken_back, moments)
    return losses[[low_rank.rank - spec.rank for spec in specs]]


def sampled_losses(error: torch.Tensor, factors: Factors, moments: Moments) -> torch.Tensor:
    """``1/2 E[(g^T (E - E_r) x)^2]`` for r = 0 ... all ranks of ``factors``, float64, over the sampled tokens: nats per token.

    The second-order loss of this weight's error alone, without taking inputs and gradients as independent: a few tokens of
    enormous activations, which have small gradients, count for what they are. Raises ValueError without samples.
    """
    if moments.input_samples is None or moments.gradient_samples is None:
        raise ValueError("samples of inputs and gradients are needed")
    # the error, and what it does, are rounded as the samples are: a mean of squares does not see it
    rounded, a, b = error.to(moments.input_samples.dtype).T, factors.a.float(), factors.b.float().T
    total = torch.zeros(b.shape[1] + 1, dtype=torch.float64, device=b.device)
    for x, g in sample_batches(moments.input_samples, moments.gradient_samples):
        change = ((x @ rounded) * g).sum(1, dtype=torch.float64).unsqueeze(1)
        made_up = product(x.float(), b).mul_(product(g.float(), a)).cumsum(1, dtype=torch.float64)
        total += torch.cat([change, change - made_up], dim=1).square_().sum(0)
    return total / len(moments.input_samples) / 2
