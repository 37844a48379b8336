"""Writes a compressed checkpoint, one tensor in memory at a time.

``factored``: the model's own state dict with what a form stores in place of a compressed weight, and one Python
file that loads it. ``dense``: the stock architecture, with the factors multiplied out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from checkpoint import modeling_template, processes
from checkpoint.files import fsync_directory, write_json, write_text
from checkpoint.forms import FORMS, Part, Spec
from checkpoint.shards import INDEX, as_bytes
from checkpoint.source import Source
from checkpoint.stock import Renumbering, pruned_config
from checkpoint.tensorfile import Entry, header

SHARD_BYTES = 5_000_000_000
PLAIN = ""  # the role of a parameter that is stored as it is
# what belongs to the tokenizer, the chat template and generation; weights, code and config.json do not come along
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
NOT_COPIED = ("config.json", INDEX, "report.json", "evaluation.json", "curves.json")


@dataclass(frozen=True)
class Replacement:
    """What the driver puts in a linear's place: how it is stored, and how to get the part when it is due.

    ``bias``: how many elements a bias will have that the part changes or brings; None: the linear's own, if any, stays.
    """

    spec: Spec
    transposed: bool
    bias: int | None
    part: Callable[[], Part]


class ShardWriter:
    """Writes safetensors files of at most ``SHARD_BYTES``: header first, then tensor after tensor.

    Of several processes each writes some of the files; ``own`` has the names of the tensors in them.
    """

    def __init__(self, directory: Path, entries: list[Entry], stem: str = "model") -> None:
        self._directory = directory
        self._shards: list[list[Entry]] = [[]]
        for entry in entries:
            if self._shards[-1] and sum(item.nbytes for item in self._shards[-1]) + entry.nbytes > SHARD_BYTES:
                self._shards.append([])
            self._shards[-1].append(entry)
        count = len(self._shards)
        self._names = (
            [f"{stem}.safetensors"]
            if count == 1
            else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        self._mine = slice(processes.index(), None, processes.count())
        self.own = {entry.name for shard in self._shards[self._mine] for entry in shard}

    def write(self, tensors: Iterable[torch.Tensor]) -> int:
        """Write the own entries from ``tensors``, which yields them in order; returns the bytes of data of all files.

        Raises ValueError if a tensor is not what its entry said.
        """
        stream = iter(tensors)
        for name, entries in zip(self._names[self._mine], self._shards[self._mine], strict=True):
            with (self._directory / name).open("wb") as file:
                file.write(header(entries, {"format": "pt"}))
                for entry in entries:
                    tensor = next(stream)
                    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                        raise ValueError(
                            f"{entry.name} was to be {entry.dtype} {entry.shape}, is {tensor.dtype} {tuple(tensor.shape)}"
                        )
                    file.write(as_bytes(tensor))
                file.flush()
                os.fsync(file.fileno())
        total = sum(entry.nbytes for shard in self._shards for entry in shard)
        if len(self._names) > 1 and processes.is_main():
            where = {
                entry.name: name for name, entries in zip(self._names, self._shards, strict=True) for entry in entries
            }
            write_json(self._directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        return total


def units(source: Source, layer_paths: Iterable[str]) -> list[str]:
    """Module or parameter paths that are loaded together: each end parameter alone, then each layer."""
    layers = list(layer_paths)
    inside = tuple(path + "." for path in layers)
    ends = [name for name in source.model.state_dict() if not name.startswith(inside)]
    return [name for name in ends if name not in source.tied] + layers


def write_factored(
    source: Source, layer_paths: list[str], replaced: dict[str, Replacement], directory: Path, runtime: str
) -> int:
    """Write the ``factored`` format into ``directory``; ``replaced`` maps module paths. Returns bytes of tensors."""
    plan: list[tuple[str, list[tuple[str, dict[str, Entry]]]]] = []
    for unit in units(source, layer_paths):
        names = [name for name in source.parameter_names([unit]) if name not in source.tied]
        plan.append((unit, [(name, _entries(source, name, replaced)) for name in names]))
    writer = ShardWriter(
        directory, [entry for _, parameters in plan for _, entries in parameters for entry in entries.values()]
    )

    def own(entries: dict[str, Entry]) -> dict[str, Entry]:
        return {role: entry for role, entry in entries.items() if entry.name in writer.own}

    def tensors() -> Iterator[torch.Tensor]:
        for unit, every in plan:
            parameters = [(name, own(entries)) for name, entries in every if own(entries)]
            if not parameters:
                continue
            with source.loaded([unit], keep_source_dtype=True):
                for name, entries in parameters:
                    if list(entries) == [PLAIN]:
                        yield source.tensor(name).detach()
                    else:
                        path = name.rpartition(".")[0]
                        part = replaced[path].part()
                        stored = dict(part.tensors())
                        for role, entry in entries.items():
                            if role not in stored:  # the bias
                                old = getattr(source.model.get_submodule(path), "bias", None)
                                yield cast(torch.Tensor, part.bias(old)).detach().to(entry.dtype)
                            else:
                                yield stored[role]

    total = writer.write(tensors())
    if processes.is_main():
        _write_factored_config(source, replaced, directory, runtime)
        copy_companions(source.directory, directory)
        fsync_directory(directory)
    return total


def _entries(source: Source, name: str, replaced: dict[str, Replacement]) -> dict[str, Entry]:
    """Entries for one parameter: itself, or what its form stores; a bias moves to where the form has it.

    A bias that the part changes is written with its weight, in the same pass.
    """
    path, _, leaf = name.rpartition(".")
    dtype = source.stored_dtype(name)
    shape = tuple(source.tensor(name).shape)
    if path not in replaced:
        return {PLAIN: Entry(name, dtype, shape)}
    spec, changed = replaced[path].spec, replaced[path].bias
    form = FORMS[spec.form]
    if leaf == "bias":
        return {} if changed is not None else {PLAIN: Entry(f"{path}.{form.bias}", dtype, shape)}
    d_out, d_in = reversed(shape) if replaced[path].transposed else shape
    stored = spec.stored(d_out, d_in)
    if changed is not None:
        stored[form.bias] = (None, (changed,))
    return {role: Entry(f"{path}.{role}", own or dtype, sizes) for role, (own, sizes) in stored.items()}


def _settings(source: Source, replaced: dict[str, Replacement]) -> dict[str, Any]:
    """What config.json says under ``layerpress``; the head is outside the base model, and may be the embedding itself."""
    prefix = source.base_path + "."
    settings: dict[str, Any] = {"format": modeling_template.FORMAT, "linears": {}}
    if source.experts:
        settings["experts"] = [path.removeprefix(prefix) for path in source.experts]
    for path, item in replaced.items():
        spec = item.spec.as_dict() | ({"bias": True} if item.bias is not None else {})
        if path.startswith(prefix):
            settings["linears"][path.removeprefix(prefix)] = spec
        else:
            settings["head"] = spec
        if f"{path}.weight" in source.tied.values():
            settings["head"] = "embedding"
    return settings


def _write_factored_config(source: Source, replaced: dict[str, Replacement], directory: Path, runtime: str) -> None:
    model = source.model
    base = getattr(model, source.base_path)
    own_type = f"layerpress_{source.config.model_type}"
    text = Path(modeling_template.__file__).read_text(encoding="utf-8")
    for alias, cls in (
        ("BaseConfig", type(source.config)),
        ("BaseForCausalLM", type(model)),
        ("BaseModel", type(base)),
    ):
        stock = getattr(modeling_template, alias)
        text = text.replace(
            f"from transformers import {stock.__name__} as {alias}",
            f"from {cls.__module__} import {cls.__name__} as {alias}",
        )
    text = text.replace('"layerpress_llama"', f'"{own_type}"')
    text = text.replace(f'PREFIX = "{modeling_template.PREFIX}"', f'PREFIX = "{source.base_path}"')
    write_text(directory / "modeling_layerpress.py", text)
    config = source.config.to_dict()
    config.update(
        model_type=own_type,
        architectures=["LayerpressForCausalLM"],
        auto_map={
            "AutoConfig": "modeling_layerpress.LayerpressConfig",
            "AutoModel": "modeling_layerpress.LayerpressModel",
            "AutoModelForCausalLM": "modeling_layerpress.LayerpressForCausalLM",
        },
        dtype=str(source.source_dtype).removeprefix("torch."),
        layerpress=_settings(source, replaced),
        runtime=runtime,
    )
    if config["layerpress"].get("head") == "embedding":
        config["tie_word_embeddings"] = False  # transformers' own tying wants a weight where there is a packed one
    write_json(directory / "config.json", config)


def write_dense(source: Source, replaced: dict[str, Replacement], directory: Path, removed: Sequence[str] = ()) -> int:
    """Write the stock architecture under the source's own keys, factors multiplied out. Returns bytes of tensors.

    ``removed`` are the paths of decoder layers that are left out, the others being renumbered. Where channels are pruned
    config.json says so: raises ValueError if no field of it is that width.
    """
    by_key = {source.stored(f"{path}.weight").key: item for path, item in replaced.items()}
    biases = {source.stored(f"{path}.bias").key: item for path, item in replaced.items() if item.bias is not None}
    numbering = Renumbering(source, removed)
    stored = [item for item in source.used_tensors() if numbering.key(item.key) is not None]

    def entry(item: Any) -> Entry:
        shape = item.shape
        if item.key in by_key:
            left = by_key[item.key]
            d_out, d_in = reversed(shape) if left.transposed else shape
            stored_as = left.spec.stored(d_out, d_in)
            if "weight" in stored_as:  # channels are gone; all else is multiplied out
                _, (d_out, d_in) = stored_as["weight"]
            shape = (d_in, d_out) if left.transposed else (d_out, d_in)
        elif item.key in biases:
            shape = (biases[item.key].bias or 0,)
        return Entry(numbering.key(item.key) or "", item.dtype, shape)

    entries = [entry(item) for item in stored]
    writer = ShardWriter(directory, entries)

    def tensors() -> Iterator[torch.Tensor]:
        for item in (item for item, due in zip(stored, entries, strict=True) if due.name in writer.own):
            if item.key in biases:
                yield cast(torch.Tensor, biases[item.key].part().bias(source.read(item))).to(item.dtype)
            elif item.key in by_key:
                product = by_key[item.key].part().dense()
                yield product.T if by_key[item.key].transposed else product
            else:
                yield source.read(item)

    total = writer.write(tensors())
    if not processes.is_main():
        return total
    kept = {item.spec.rank for item in replaced.values() if item.spec.form == "input-channels"}
    config = numbering.config() if removed else pruned_config(source, kept)
    if config is None:
        shutil.copyfile(source.directory / "config.json", directory / "config.json")
    else:
        write_json(directory / "config.json", config)
    copy_companions(source.directory, directory)
    fsync_directory(directory)
    return total


def copy_companions(source: Path, directory: Path) -> None:
    """Tokenizer files, chat template, generation config and licence, byte for byte."""
    for pattern in COPIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name not in NOT_COPIED:
                shutil.copyfile(path, directory / path.name)
