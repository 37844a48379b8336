"""Loss-aware truncation, weighted on both sides (DESIGN section 4; two-sided form as in OBD-LLM and IO-SVD).

``min |G^1/2 (W - W') C^1/2|^2_F`` over rank r, with ``C = E[x x^T]`` of the input and ``G = E[g g^T]`` of the loss gradient
at the output. Half the objective is the second-order, Kronecker-factored estimate of KL(dense || compressed) in nats per
token, so the curves of all linears share one unit. Only the smaller side is decomposed, in float64:

- ``d_out <= d_in``: from ``S = W C W^T`` and ``G``. With ``L L^T = G``, ``L^T S L = U s^2 U^T``:
  ``a = L^-T U_r``, ``b = U_r^T L^T W``.
- ``d_in < d_out``: from ``C`` and ``P = W^T G W``, the second moment of ``W^T g``. With ``L L^T = C``, ``L^T P L = V s^2 V^T``:
  ``a = W L V_r``, ``b = V_r^T L^-1``.

The root is the Cholesky factor of a damped moment: its triangular inverse is exact where the numerical inverse
of a singular root is not, and full rank gives ``W`` back whatever the text was.
"""

from __future__ import annotations

import torch

from calibration.moments import Moments, sample_batches
from calibration.products import product
from compress.counts import count
from compress.parts import Factors
from compress.truncation import FEW, damping_floor, descending, leading, tails

MORE = 8  # random vectors besides those that are wanted: the more, the fewer products


def two_sided(weight: torch.Tensor, moments: Moments, rank: int, damping: float) -> Factors:
    """Ordered factors of ``weight`` ``(d_out, d_in)`` float64, with losses corrected by samples, in nats per token.

    The Kronecker-factored Fisher takes ``x`` and ``g`` of a token as independent. In the basis that it gives, the
    loss of dropping direction i is ``1/2 E[(g^T a_i)^2 (b_i x)^2]``, which is measured on the sampled tokens: the
    eigenvalue correction of EK-FAC (George et al. 2018, arXiv 1806.03884, section 3), here on the directions of
    the truncation. It changes what a rank is worth to the pool, not the factors. Raises ValueError if a moment is missing.
    """
    full = kronecker(weight, moments, min(weight.shape), damping)
    if moments.input_samples is None or moments.gradient_samples is None:
        raise ValueError("samples of inputs and gradients are needed")
    # in the samples' own dtype: what rounding does to a direction is nothing beside how much the tokens differ
    a, b = full.a.to(moments.gradient_samples.dtype), full.b.T.to(moments.input_samples.dtype)
    power = torch.zeros(b.shape[1], dtype=torch.float64, device=b.device)
    for x, g in sample_batches(moments.input_samples, moments.gradient_samples):
        along, back = product(x, b).float(), product(g, a).float()
        power += along.square_().mul_(back.square_()).sum(0, dtype=torch.float64)
    return Factors(full.a[:, :rank], full.b[:rank], tails(power / len(moments.input_samples), rank) / 2)


def kronecker(weight: torch.Tensor, moments: Moments, rank: int, damping: float) -> Factors:
    """Ordered factors of ``weight`` ``(d_out, d_in)`` float64; ``loss[r]`` as the Kronecker-factored Fisher has it.

    ``damping`` times the mean diagonal is added to ``C`` and to ``G``, each in both places where it enters, so that
    directions which the text did not excite keep a small weight. Raises ValueError if a moment is missing.
    """
    input_floor = damping_floor(damping, moments.input_power)
    gradient_floor = damping_floor(damping, moments.gradient_power)
    if weight.shape[0] <= weight.shape[1]:
        if moments.gradient is None:
            raise ValueError("a wide weight needs the moment of its output gradient")
        second = moments.of_output(weight).add_(product(weight, weight.T), alpha=input_floor)
        damped = _damped(moments.gradient, gradient_floor)
    else:
        if moments.input is None:
            raise ValueError("a tall weight needs its input's moment")
        second = product(weight.T, weight).mul_(gradient_floor).add_(_pulled(weight, moments))
        damped = _damped(moments.input, input_floor)
    if not rank:  # all that is asked is what all directions cost together
        return Factors(weight[:, :0], weight[:0], (damped * second).sum().view(1) / 2)
    root = torch.linalg.cholesky(damped)
    power, vectors = descending(product(product(root.T, second), root))
    a, b = _along(weight, root, vectors[:, :rank])
    return Factors(a, b, tails(power, rank) / 2)


def correction(error: torch.Tensor, moments: Moments, rank: int, damping: float) -> Factors:
    """``kronecker`` of a quantization's error ``(d_out, d_in)`` float64, of which few directions are wanted.

    They are found by products of vectors with the error and the moments, in float32; no square matrix is multiplied with another.
    ``loss`` is empty then: what all directions cost together is not known. Raises ValueError if a moment is missing.
    """
    if not 0 < rank <= min(error.shape) * FEW:
        return kronecker(error, moments, rank, damping)
    if moments.input is None or moments.gradient is None:
        raise ValueError("the moments of the input and of the output's gradient are needed")
    single = error.float()
    sides = [
        (moments.gradient, damping_floor(damping, moments.gradient_power), single.T),
        (moments.input, damping_floor(damping, moments.input_power), single),
    ]
    (near, near_floor, across), (far, far_floor, _) = sides if error.shape[0] <= error.shape[1] else sides[::-1]
    root = torch.linalg.cholesky(_damped(near, near_floor))

    def applied(vectors: torch.Tensor) -> torch.Tensor:
        there = product(across, product(root, vectors).float())
        weighted = product(far, there).add_(there, alpha=far_floor)
        return product(root.T, product(across.T, weighted).double())

    random = torch.randn(len(root), rank + MORE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Factors(*_along(error, root, leading(applied, random.to(root.device), rank)), torch.empty(0))


def _along(weight: torch.Tensor, root: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of ``weight`` along orthonormal directions ``kept`` ``(smaller side, r)`` of it between the roots, balanced."""
    if weight.shape[0] <= weight.shape[1]:
        a = torch.linalg.solve_triangular(root.T, kept, upper=True)
        b = product(product(root, kept).T, weight)
    else:
        a = product(weight, product(root, kept))
        b = torch.linalg.solve_triangular(root, kept.T, upper=False, left=False)
    _balance(a, b)
    return a, b


def _pulled(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    """``W^T G W``: as it was summed, or, for an error, in float32, as exact as the moment is."""
    if moments.pulled is not None:
        return moments.pulled
    if moments.gradient is None:
        raise ValueError("a tall weight needs the moment of its output gradient, or that pulled back to its input")
    single = weight.float()
    return product(product(single.T, moments.gradient), single)


def _damped(moment: torch.Tensor, floor: float) -> torch.Tensor:
    damped = moment.double()
    damped = (damped + damped.T) / 2
    damped.diagonal().add_(floor)
    return damped


def _balance(a: torch.Tensor, b: torch.Tensor) -> None:
    """Give each direction's column of ``a`` and row of ``b`` the same length, in place: half-precision exponents stay in range."""
    size_a, size_b = torch.linalg.vector_norm(a, dim=0), torch.linalg.vector_norm(b, dim=1)
    scale = (size_b / size_a).sqrt()
    usable = torch.isfinite(scale) & (scale > 0)
    count("directions of length zero, not balanced", int((~usable).sum()))
    scale = torch.where(usable, scale, torch.ones_like(scale))
    a *= scale
    b /= scale[:, None]
