"""Quantized weights as they are stored: codes in 32-bit words by compressed-tensors, never a bit layout of our own.

That library is loaded when something is packed: it takes 10 MB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from checkpoint.forms import Grid, Spec
from checkpoint.modeling_template import unpack
from compress.parts import LowRank
from compress.quantizers.grid import Quantized, values
from compress.quantizers.rounding import round_to_nearest

TOGETHER = 1 << 22  # codes that are packed or unpacked at a time: each is widened to 32 bits, several times over


def _pack(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Codes int8 in words int32 along ``dim``; ``unpack`` undoes it."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return pack_to_int32(codes, bits, packed_dim=dim)


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int8 ``(rows, n)`` in words int32 ``(rows, ceil(n bits / 32))``."""
    return torch.cat([_pack(part, bits, 1) for part in codes.split(max(1, TOGETHER // codes.shape[1]))])


def unpack_rows(words: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Codes int8 ``(rows, width)`` from the words of ``pack_rows``."""
    parts = words.split(max(1, TOGETHER // width))
    return torch.cat([unpack(part, bits, (len(part), width), 1) for part in parts])


def packed_tensors(prefix: str, quantized: Quantized) -> dict[str, torch.Tensor]:
    """The tensors of a packed linear at ``prefix``: codes along a row, zero points along a column (modeling_template.grid_shapes)."""
    bits = quantized.grid.bits
    scale = quantized.scale
    if quantized.grid.power_of_two:
        scale = (torch.log2(scale.float()) + 127).to(torch.uint8)
    tensors = {"weight_packed": pack_rows(quantized.codes, bits), "weight_scale": scale}
    if quantized.zero is not None:
        tensors["weight_zero_point"] = _pack(quantized.zero, bits, 0)
    return {prefix + name: tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class QuantizedFactors:
    """``W' = a b``, both factors as integers on the same grid."""

    a: Quantized
    b: Quantized

    @property
    def spec(self) -> Spec:
        """How it is stored."""
        return Spec("factors", self.b.codes.shape[0], factors=self.a.grid)

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``."""
        return self.a.codes.shape[0], self.b.codes.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """As the module holds them."""
        return packed_tensors("factor_in.", self.b) | packed_tensors("factor_out.", self.a)

    def dense(self) -> torch.Tensor:
        """The product ``(d_out, d_in)``, in the dtype of the scales."""
        return (self.a.dense() @ self.b.dense()).to(self.a.scale.dtype)

    def bias(self, old: torch.Tensor | None) -> torch.Tensor | None:
        """The old bias: it stays."""
        return old


@dataclass(frozen=True)
class Packed:
    """A weight as integers, plus a correction of low rank or None."""

    weight: Quantized
    correction: LowRank | QuantizedFactors | None = None

    @property
    def spec(self) -> Spec:
        """How it is stored."""
        if self.correction is None:
            return Spec("packed", 0, self.weight.grid)
        return Spec("packed", self.correction.spec.rank, self.weight.grid, self.correction.spec.factors)

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``."""
        return self.weight.codes.shape[0], self.weight.codes.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """As the module holds them."""
        correction = self.correction.tensors() if self.correction else {}
        # the factors are the packed module's own, not modules in it
        own = {name.replace(".", "_", 1): tensor for name, tensor in correction.items()}
        return packed_tensors("", self.weight) | own

    def dense(self) -> torch.Tensor:
        """The weight ``(d_out, d_in)``, summed in float32, in the dtype of the scales."""
        if self.correction is None:
            return self._as_stored()
        total = self.weight.dense()
        if isinstance(self.correction, LowRank):
            total = total + self.correction.a.float() @ self.correction.b.float()
        else:
            total = total + self.correction.a.dense() @ self.correction.b.dense()
        return total.to(self.weight.scale.dtype)

    def _as_stored(self) -> torch.Tensor:
        """Without a correction; some rows at a time, because float32 of a whole vocabulary is several times the weight."""
        codes, scale, zero = self.weight.codes, self.weight.scale, self.weight.zero
        total, count = scale.new_empty(codes.shape), max(1, TOGETHER // codes.shape[1])
        for first in range(0, len(codes), count):
            rows = slice(first, first + count)
            total[rows] = values(codes[rows], scale[rows], None if zero is None else zero[rows])
        return total

    def bias(self, old: torch.Tensor | None) -> torch.Tensor | None:
        """The old bias: it stays."""
        return old


def quantized_factors(part: LowRank, grid: Grid) -> QuantizedFactors:
    """Both factors rounded to the nearest on ``grid``; raises ValueError if ``part`` has a shift."""
    if part.shift is not None:
        raise ValueError("a shift has no place in quantized factors")
    (inner,) = round_to_nearest(part.b, [grid], None, None, 0.0, part.b.dtype)
    (outer,) = round_to_nearest(part.a, [grid], None, None, 0.0, part.a.dtype)
    return QuantizedFactors(outer, inner)
