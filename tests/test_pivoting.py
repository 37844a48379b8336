"""The pivoted form holds the very same product in fewer numbers, whatever the factors are."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.forms import stored_module
from compress.parts import LowRank
from compress.pivoting import LARGEST_COEFFICIENT, dominant_rows, pivoted


@st.composite
def low_rank(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> LowRank:
    """Factors of any shape and scale, their columns sometimes equal or zero."""
    d_out, d_in = draw(st.integers(2, 40)), draw(st.integers(2, 40))
    rank = draw(st.integers(1, min(d_out, d_in)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scales = 10.0 ** torch.randint(-3, 4, (rank,), generator=generator, dtype=torch.float64)
    a = torch.randn(d_out, rank, generator=generator, dtype=torch.float64) * scales
    if draw(st.booleans()):
        a[:, -1] = draw(st.sampled_from([0.0, 1.0])) * a[:, 0]
    return LowRank(a.to(dtype), torch.randn(rank, d_in, generator=generator, dtype=torch.float64).to(dtype))


@given(low_rank())
def test_rows_follow_from_the_pivots_with_small_coefficients(part):
    rows, coefficients = dominant_rows(part.a)
    assert sorted(rows.tolist()) == list(range(part.a.shape[0]))
    assert coefficients.numel() == 0 or float(coefficients.abs().max()) <= LARGEST_COEFFICIENT
    rest, pivots = part.a[rows[part.rank :]], part.a[rows[: part.rank]]
    assert torch.allclose(coefficients @ pivots, rest, atol=1e-9 * float(part.a.abs().max()))


@given(low_rank())
def test_the_product_is_the_same_and_is_stored_as_the_form_says(part):
    found = pivoted(part)
    exact = part.a @ part.b
    assert (found.dense() - exact).abs().max() <= 1e-5 * exact.abs().max()
    d_out, d_in = part.shape
    stored = found.spec.stored(d_out, d_in)
    assert {name: tuple(item.shape) for name, item in found.tensors().items()} == {
        name: shape for name, (_, shape) in stored.items()
    }
    numbers = part.rank * (d_out + d_in - part.rank)
    assert found.spec.parameters(d_out, d_in) == numbers
    assert found.spec.nbytes(d_out, d_in, 8) == 8 * numbers + 4 * d_out
    x, bias = torch.randn(3, d_in, dtype=torch.float64), torch.randn(d_out, dtype=torch.float64)
    for one in (part, found):
        y = stored_module(one, bias, torch.float64)(x)
        assert torch.allclose(y, x @ exact.T + bias, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


def test_half_precision_costs_little():
    """Rounding rows and coefficients to bfloat16 (one part in 256) leaves the product within 1 %."""
    generator = torch.Generator().manual_seed(0)
    a = torch.linalg.qr(torch.randn(256, 96, generator=generator, dtype=torch.float64))[0]
    b = (
        torch.randn(96, 256, generator=generator, dtype=torch.float64)
        * torch.logspace(0, -2, 96, dtype=torch.float64)[:, None]
    )
    part = LowRank(a.bfloat16(), b.bfloat16())
    exact = part.a.double() @ part.b.double()
    error = (pivoted(part).dense().double() - exact).norm() / exact.norm()
    assert error < 0.01
