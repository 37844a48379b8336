"""What is in a checkpoint directory, read from the safetensors headers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from checkpoint.errors import UserError
from checkpoint.finite import finite
from checkpoint.memory import release_memory

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
INDEX = "model.safetensors.index.json"
PIECE = 16_000_000  # bytes of a tensor that are verified at a time
Stamp = tuple[int, int, int]  # size, time of the last change, and number of a file


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk: its key, its shard, what the header says of it, and which file it was that said so."""

    key: str
    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    stamp: Stamp

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def shard_paths(directory: Path) -> list[Path]:
    """The safetensors shards of a checkpoint directory, in order of their names.

    Raises UserError if there are none, if only pickled weights are there, or if the index names a
    file that is missing or lies outside the directory.
    """
    index = directory / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as problem:
            raise UserError(f"{index} is not a safetensors index ({problem}); bring the file again") from problem
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{index} names {name!r}, which is not a plain file name; bring the file again")
        present = {path.name for path in directory.iterdir() if path.is_file()}
        missing = [name for name in names if name not in present]
        if missing:
            raise UserError(
                f"shard {missing[0]} named by {index} is missing ({len(missing)} of {len(names)} are); bring it again"
            )
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    if pickled:
        raise UserError(
            f"{directory} has pickled weights only ({pickled[0]}), which can run code when read; convert it: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) in transformers writes safetensors"
        )
    raise UserError(f"{directory} has neither model.safetensors nor {INDEX}; is it a Hugging Face checkpoint?")


def read_headers(shards: list[Path]) -> dict[str, StoredTensor]:
    """Every tensor's key, dtype and shape; opens each shard, reads no weight.

    Raises UserError for a truncated or corrupted shard, a key stored twice, or a dtype that is not a
    16-, 32- or 64-bit float (integer tensors are kept out of compression but are an error here: a
    quantized source cannot be compressed again).
    """
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        try:
            stamp = stamp_of(shard)
            with safe_open(shard, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 - not a dict
                    view = handle.get_slice(key)
                    if view.get_dtype() not in DTYPES:
                        raise UserError(
                            f"tensor {key} in {shard.name} is {view.get_dtype()}; layerpress reads float checkpoints "
                            "(bf16, fp16, fp32): bring the unquantized model"
                        )
                    if key in tensors:
                        raise UserError(
                            f"tensor {key} is in {tensors[key].shard.name} and in {shard.name}; bring the files again"
                        )
                    tensors[key] = StoredTensor(key, shard, DTYPES[view.get_dtype()], tuple(view.get_shape()), stamp)
        except (SafetensorError, OSError) as problem:
            raise UserError(f"shard {shard} is truncated or corrupted ({problem}); bring it again") from problem
    return tensors


def stamp_of(path: Path) -> Stamp:
    """What tells a file from another that takes its place, or from itself with other bytes."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


@contextmanager
def _opened(shard: Path, stamp: Stamp) -> Iterator[Any]:
    """A shard's handle; UserError if the file cannot be read, or is no longer the one whose header was read."""
    try:
        if stamp_of(shard) != stamp:
            raise UserError(
                f"shard {shard} has changed since this run began; repeat the command: it goes on if the weights are the same"
            )
        with safe_open(shard, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as problem:
        raise UserError(f"shard {shard} is truncated or corrupted ({problem}); bring it again") from problem


def read_tensors(wanted: list[StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors, shard by shard.

    Each shard is opened anew for each call and closed after it: a held handle lets resident memory
    grow to the size of the model. Raises UserError if the file is no longer the one whose header was read.
    """
    for shard, stamp in dict.fromkeys((item.shard, item.stamp) for item in wanted):
        with _opened(shard, stamp) as handle:
            for item in wanted:
                if item.shard == shard:
                    yield item.key, handle.get_tensor(item.key)


def read_pieces(item: StoredTensor) -> Iterator[torch.Tensor]:
    """A tensor's numbers in order, in pieces of about ``PIECE`` bytes, one of them in memory; raises as ``read_tensors`` does."""
    if item.nbytes <= PIECE:
        yield from (tensor for _, tensor in read_tensors([item]))
        return
    rows = max(1, PIECE * item.shape[0] // item.nbytes)
    for first in range(0, item.shape[0], rows):
        with _opened(item.shard, item.stamp) as handle:
            yield handle.get_slice(item.key)[first : first + rows]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def verify_weights(tensors: dict[str, StoredTensor]) -> str:
    """Read every tensor once: the sha256 of names, dtypes, shapes and bytes.

    Raises UserError naming the first tensor that holds NaN or inf, before hours are spent on it.
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        item = tensors[key]
        digest.update(f"{key}|{item.dtype}|{item.shape}\n".encode())
        for piece in read_pieces(item):
            flat = piece.contiguous().view(-1)
            # the embedding is the largest of all that is in memory in a small model: neither it nor its check is there whole
            if not all(finite(part) for part in flat.split(1 << 20)):
                raise UserError(
                    f"tensor {key} in {item.shard.name} holds NaN or inf; the checkpoint is damaged, bring it again"
                )
            digest.update(as_bytes(flat))
        del piece, flat
        release_memory()
    return digest.hexdigest()
