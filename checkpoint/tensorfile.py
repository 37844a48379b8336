"""Safetensors files written by Python: what the disk refuses is an OSError with its number and its file."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint.shards import as_bytes

DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
}
# bytes of a cache line: weights are used where the file is mapped, and rows that straddle lines make decoding slower
ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: known by name, dtype and shape before any weight is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header: length (8 bytes), then JSON padded so that the data begin at a multiple of ALIGNMENT."""
    described: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        described[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors`` as one file; not yet flushed to disk."""
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with path.open("wb") as file:
        file.write(header(entries, metadata))
        for tensor in tensors.values():
            file.write(as_bytes(tensor))
