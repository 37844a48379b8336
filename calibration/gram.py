"""Gram matrices ``rows^T rows``, summed in float32: products on and right of the diagonal alone, copied across it once at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from calibration.products import by_numpy, product
from checkpoint.modeling_template import even_rows

# tokens converted to float32 at a time, or so many that there are NUMBERS of them: bounds the temporary
ROWS, NUMBERS = 1024, 1 << 21
# rows of a Gram matrix that are made at a time, and the part of it: narrower bands save more, and keep the multipliers less busy
BAND, BANDS = 128, 16
# up to this width one thread of OpenBLAS, which makes a triangle of such a product, is an eighth faster than the bands; several are slower
NARROW = 1024


def has_bfloat16_products() -> bool:
    """Whether this machine multiplies bfloat16 natively (AMX or AVX-512 BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextmanager
def exact_bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """Multiply values that *are* bfloat16 in bfloat16 (on a GPU: TF32), with float32 sums: exact products, faster units."""
    units: list[tuple[Any, str]] = [(torch.backends.cuda.matmul, "tf32")]
    if has_bfloat16_products():
        units.append((torch.backends.mkldnn.matmul, "bf16"))  # type: ignore[attr-defined]
    before = [unit.fp32_precision for unit, _ in units]
    if dtype == torch.bfloat16:
        for unit, precision in units:
            unit.fp32_precision = precision
    try:
        yield
    finally:
        for (unit, _), precision in zip(units, before, strict=True):
            unit.fp32_precision = precision


def rows_at_a_time(width: int) -> int:
    """How many tokens of ``width`` numbers are converted to float32 at a time."""
    return max(ROWS, NUMBERS // width)


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """``total += rows^T rows`` on and right of the diagonal; ``rows`` ``(tokens, d)`` of any dtype, ``total`` ``(d, d)`` float32.

    What is left of it is not touched, or not all of it: ``across`` fills it in when everything is summed.
    """
    with torch.autocast("cpu", enabled=False), exact_bfloat16_products(rows.dtype):
        for chunk in rows.split(rows_at_a_time(rows.shape[1])):
            wide = even_rows(chunk).float()
            if torch.get_num_threads() == 1 and wide.shape[1] <= NARROW and by_numpy(wide):
                total += product(wide.T, wide)
                continue
            for band in _bands(total):
                total[band, band.start :].addmm_(wide[:, band].T, wide[:, band.start :])


def across(total: torch.Tensor) -> torch.Tensor:
    """``total`` itself, what is right of its diagonal copied to the left."""
    for band in _bands(total):
        total[band, : band.start] = total[: band.start, band].T
    return total


def _bands(total: torch.Tensor) -> list[slice]:
    step = max(BAND, len(total) // BANDS)
    return [slice(first, first + step) for first in range(0, len(total), step)]
