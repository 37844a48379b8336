"""Products and eigenvectors are the same by whichever library makes them."""

from __future__ import annotations

import pytest
import torch

from calibration import products
from calibration.moments import AT_A_TIME, squared_lengths
from calibration.products import eigenvectors, product, subtract_product


@pytest.fixture(params=[True, False], ids=["openblas", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever this processor has, the one and the other."""
    monkeypatch.setattr(products, "OPENBLAS_IS_WIDER", request.param)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_product_of_views_is_that_of_their_numbers(dtype: torch.dtype) -> None:
    a, b = random(7, 12, dtype=dtype), random(9, 12, dtype=dtype)
    for left, right in [(a, b.T), (a.T, a), (b[:, :5].T, b), (a[::2], b.T[:, 1:4])]:
        exact = (left.double()[:, :, None] * right.double()[None]).sum(1)
        found = product(left, right)
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), exact, rtol=0, atol=20 * torch.finfo(dtype).eps * float(exact.abs().max())
        )


@pytest.mark.usefixtures("library")
def test_product_is_new() -> None:
    a, b = random(4, 4), random(4, 4)
    before = a.clone(), b.clone()
    product(a, b).add_(1)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("piece", [1, 20, products.PIECE])  # numbers: a row at a time, two, all
def test_a_product_is_subtracted_in_place(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PIECE", piece)
    total, a, b = random(7, 9), random(12, 7), random(12, 9)
    expected = total[2:].clone() - a.T[2:] @ b
    whole = total.clone()
    subtract_product(whole[2:], a.T[2:], b)
    torch.testing.assert_close(whole[2:], expected)
    assert torch.equal(whole[:2], total[:2])
    subtract_product(whole[7:], a.T[7:], b)  # of no rows


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvectors_make_the_lower_triangle_s_matrix(dtype: torch.dtype) -> None:
    half = random(30, 30, dtype=dtype)
    symmetric = half + half.T
    values, vectors = eigenvectors(symmetric.tril())
    assert bool((values.diff() >= 0).all())
    near = 100 * torch.finfo(dtype).eps * float(values.abs().max())
    torch.testing.assert_close(vectors * values @ vectors.T, symmetric, rtol=0, atol=near)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(30, dtype=dtype), rtol=0, atol=near)


@pytest.mark.parametrize("rows", [0, 3, AT_A_TIME // 512 * 2 + 1])
def test_squared_lengths_of_rows(rows: int) -> None:
    x = random(rows, 512).bfloat16()
    torch.testing.assert_close(squared_lengths(x).double(), x.double().square().sum(1), rtol=1e-5, atol=0)
