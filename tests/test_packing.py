"""Packed parts: pack and unpack are exact, sizes are what the form says, module and part give the same weight."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.moments import Moments
from checkpoint.forms import Grid, Spec, stored_module
from checkpoint.modeling_template import unpack
from compress import packing
from compress.candidates import quantized_product_losses
from compress.packing import Packed, packed_tensors, quantized_factors
from compress.parts import LowRank
from compress.quantizers.rounding import round_to_nearest


@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    dim=st.integers(0, 1),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_packing_is_exact_and_dense(bits, rows, columns, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator, dtype=torch.int8)
    packed = pack_to_int32(codes, bits, packed_dim=dim)
    words = -(-(columns if dim else rows) * bits // 32)
    assert packed.dtype == torch.int32 and packed.shape == ((rows, words) if dim else (words, columns))
    assert torch.equal(unpack(packed, bits, (rows, columns), dim), codes)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rows_packed_a_few_at_a_time_are_as_packed_at_once(bits, monkeypatch):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (11, 37), dtype=torch.int8)
    monkeypatch.setattr(packing, "TOGETHER", 2 * 37)
    words = packing.pack_rows(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(packing.unpack_rows(words, bits, 37), codes)


def test_the_loss_of_a_quantized_product_is_that_of_what_is_stored():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(160, 256, generator=generator).double()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    x, g = torch.randn(32, 256, generator=generator), torch.randn(32, 160, generator=generator)
    moments = Moments(32, 1.0, input_samples=x, gradient_samples=g)
    product = LowRank((u * s.sqrt()).float()[:, :128], (s.sqrt()[:, None] * v).float()[:128])
    specs = [Spec("factors", rank, factors=Grid(4, 64)) for rank in (128, 64)]
    for spec, loss in zip(specs, quantized_product_losses(weight, product, specs, moments).tolist(), strict=True):
        cut = LowRank(product.a[:, : spec.rank], product.b[: spec.rank])
        assert spec.factors is not None
        change = weight.float() - quantized_factors(cut, spec.factors).dense()
        direct = ((x @ change.T) * g).sum(1).square().mean() / 2
        assert loss == pytest.approx(float(direct), rel=1e-3)


GRIDS = [
    Grid(b, g, s, p)
    for b in (2, 3, 4, 5, 6, 8)
    for g in (0, 8)
    for s, p in ((True, False), (False, False), (True, True))
]


def parts(grid: Grid, rank: int, factor_bits: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(grid.bits)
    weight = torch.randn(20, 24, generator=generator) * 0.1
    (quantized,) = round_to_nearest(weight, [grid], None, None, 0.0, dtype)
    if not rank:
        return Packed(quantized)
    low = LowRank(
        torch.randn(20, rank, generator=generator).to(dtype), torch.randn(rank, 24, generator=generator).to(dtype)
    )
    return Packed(quantized, quantized_factors(low, Grid(factor_bits)) if factor_bits else low)


@pytest.mark.parametrize("rank,factor_bits", [(0, 0), (3, 0), (3, 8)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_module_holds_what_the_part_says_in_the_bytes_of_its_form(grid, rank, factor_bits):
    part = parts(grid, rank, factor_bits, torch.bfloat16)
    bias = torch.randn(20)
    tensors = part.tensors()
    stored = part.spec.stored(20, 24)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        name: (dtype or torch.bfloat16, shape) for name, (dtype, shape) in stored.items()
    }
    assert part.spec.nbytes(20, 24, 2) == sum(tensor.nbytes for tensor in tensors.values())
    assert part.spec.parameters(20, 24) == 20 * 24 + rank * 44
    exact = parts(grid, rank, factor_bits, torch.float32)
    module = stored_module(exact, bias, torch.float32)
    assert torch.allclose(module.dense(), exact.dense(), rtol=1e-5, atol=1e-6)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    y = module(x)
    assert torch.allclose(y, torch.nn.functional.linear(x, exact.dense(), bias), rtol=1e-4, atol=1e-4)
    assert torch.equal(module(x), y), "the kept weight gives the same"


def test_quantized_factors_are_a_linear_of_their_own():
    generator = torch.Generator().manual_seed(0)
    low = LowRank(torch.randn(20, 4, generator=generator), torch.randn(4, 24, generator=generator))
    part = quantized_factors(low, Grid(8))
    assert part.spec.nbytes(20, 24, 4) == 4 * 24 + 4 * 4 + 20 * 4 + 20 * 4
    module = stored_module(part, None, torch.float32)
    x = torch.randn(3, 24, generator=generator)
    assert torch.allclose(module(x), x @ part.dense().T, rtol=1e-3, atol=1e-3)
    assert (part.dense() - low.dense()).norm() < 0.02 * low.dense().norm()
    with pytest.raises(ValueError, match="shift"):
        quantized_factors(LowRank(low.a, low.b, torch.zeros(20)), Grid(8))


def test_power_of_two_scales_take_a_byte():
    (quantized,) = round_to_nearest(
        torch.randn(4, 32) * 1e-3, [Grid(4, 8, True, True)], None, None, 0.0, torch.bfloat16
    )
    stored = packed_tensors("", quantized)
    assert stored["weight_scale"].dtype == torch.uint8
    assert torch.equal(torch.exp2(stored["weight_scale"].float() - 127), quantized.scale.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group,symmetric,rank", [(32, True, 3), (64, False, 0), (0, True, 0), (192, True, 0)])
def test_a_weight_that_stays_packed_multiplies_as_the_unpacked_one(bits, group, symmetric, rank, dtype):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(48, 192, generator=generator) * 0.1
    (quantized,) = round_to_nearest(weight, [Grid(bits, group, symmetric)], None, None, 0.0, dtype)
    low = LowRank(*(torch.randn(shape, generator=generator).to(dtype) * 0.1 for shape in ((48, 3), (3, 192))))
    part = Packed(quantized, low if rank else None)
    bias = torch.randn(48, generator=generator).to(dtype)
    dense, packed = (stored_module(part, bias, dtype) for _ in range(2))
    packed.stays_packed = True
    x = torch.randn(2, 5, 192, generator=generator).to(dtype)
    wanted, found = dense(x).float(), packed(x).float()
    assert packed.kernel is not None and packed.kept is None and found.shape == (2, 5, 48)
    assert torch.allclose(found, wanted, atol=float(wanted.abs().max()) * (1e-5 if dtype == torch.float32 else 0.02))
    assert torch.equal(packed(x).float(), found), "what is kept gives the same"
