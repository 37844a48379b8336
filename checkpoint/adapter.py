"""``--export adapter``: packed integers that transformers loads natively, their corrections as a PEFT adapter beside them.

The base is the stock architecture under the source's own keys, in compressed-tensors' ``pack-quantized`` format. Under an adapter the
base is dequantized while it loads (peft needs plain weights), for which transformers knows one grid for all linears.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoint import processes
from checkpoint.files import fsync_directory, write_json
from checkpoint.forms import Grid
from checkpoint.sink import Replacement, ShardWriter, copy_companions
from checkpoint.source import Source
from checkpoint.tensorfile import Entry

SHAPE_BYTES = 16  # what compressed-tensors stores beside each packed weight: its shape, two int64
FACTORS = {"factor_in_weight": "lora_A", "factor_out_weight": "lora_B"}


def write_adapter(source: Source, replaced: Mapping[str, Replacement], directory: Path) -> int:
    """Write base and, where there are corrections, adapter into ``directory``; returns bytes of tensors.

    Every replacement is packed, not transposed, with scales and factors in the weight's dtype. Raises ValueError where
    linears with corrections stand beside others of another grid.
    """
    corrected = {path: item for path, item in replaced.items() if item.spec.rank}
    grids = list(dict.fromkeys(item.spec.weight for item in replaced.values() if item.spec.weight))
    if corrected and len(grids) > 1:
        raise ValueError("a base under an adapter can have one grid only")
    by_key = {source.stored(f"{path}.weight").key: item for path, item in replaced.items()}

    def entries(item: Any) -> list[Entry]:
        if item.key not in by_key:
            return [Entry(item.key, item.dtype, item.shape)]
        stored = by_key[item.key].spec.stored(*item.shape)
        prefix = item.key.removesuffix("weight")
        packed = [
            Entry(prefix + name, dtype or item.dtype, shape)
            for name, (dtype, shape) in stored.items()
            if name not in FACTORS
        ]
        return [*packed, Entry(f"{prefix}weight_shape", torch.int64, (2,))]

    writer = ShardWriter(directory, [entry for item in source.used_tensors() for entry in entries(item)])

    def tensors() -> Iterator[torch.Tensor]:
        for item in source.used_tensors():
            due = [entry.name for entry in entries(item) if entry.name in writer.own]
            if due and item.key not in by_key:
                yield source.read(item)
            elif due:
                part, prefix = by_key[item.key].part(), item.key.removesuffix("weight")
                made = {f"{prefix}{name}": tensor for name, tensor in part.tensors().items()}
                made[f"{prefix}weight_shape"] = torch.tensor(part.shape)
                yield from (made[name] for name in due)

    total = writer.write(tensors())
    if corrected:
        total += _write_corrections(source, corrected, directory)
    if not processes.is_main():
        return total
    config = json.loads((source.directory / "config.json").read_text(encoding="utf-8"))
    write_json(
        directory / "config.json", config | {"quantization_config": _quantization(replaced, grids, bool(corrected))}
    )
    copy_companions(source.directory, directory)
    fsync_directory(directory)
    return total


def _write_corrections(source: Source, corrected: Mapping[str, Replacement], directory: Path) -> int:
    """The adapter: factors and its configuration."""
    shapes = {path: tuple(source.tensor(f"{path}.weight").shape) for path in corrected}
    entries = [
        Entry(f"base_model.model.{path}.{FACTORS[name]}.weight", source.stored_dtype(f"{path}.weight"), shape)
        for path, item in corrected.items()
        for name, (_, shape) in item.spec.stored(*shapes[path]).items()
        if name in FACTORS
    ]

    writer = ShardWriter(directory, entries, "adapter_model")

    def tensors() -> Iterator[torch.Tensor]:
        for item in corrected.values() if writer.own else ():
            stored = item.part().tensors()
            yield from (stored[name] for name in FACTORS)

    total = writer.write(tensors())
    if not processes.is_main():
        return total
    ranks = {path: item.spec.rank for path, item in corrected.items()}
    largest = max(ranks.values())
    configuration = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source.directory),
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,  # alpha == r: the product is added as it is
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(corrected),
    }
    write_json(directory / "adapter_config.json", configuration)
    return total


def _quantization(replaced: Mapping[str, Replacement], grids: list[Grid], dequantize: bool) -> dict[str, Any]:
    """``quantization_config`` as compressed-tensors reads it: a group of linears for each grid."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": dequantize,
        "ignore": [],
        "config_groups": {
            f"group_{index}": {
                "targets": [path for path, item in replaced.items() if item.spec.weight == grid],
                "weights": {
                    "num_bits": grid.bits,
                    "type": "int",
                    "symmetric": grid.symmetric,
                    "strategy": "group" if grid.group_size else "channel",
                    "group_size": grid.group_size or None,
                    "dynamic": False,
                },
            }
            for index, grid in enumerate(grids)
        },
    }
