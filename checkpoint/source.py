"""A checkpoint on disk seen as the model's own class, with weights only where they are needed.

The skeleton is the model's class on the meta device. ``load`` brings the parameters under some
module paths in from their safetensors slices; ``evict`` puts them back to meta. transformers' renaming
and fusing of tensors on load is private API: this file alone touches it (tests/test_contract.py guards it).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from checkpoint.device import CPU
from checkpoint.errors import UserError, told
from checkpoint.memory import release_memory
from checkpoint.modeling_template import Experts, stacked_names, stacks_experts
from checkpoint.shards import StoredTensor, read_headers, read_tensors, shard_paths


def resolve_model(model: str) -> Path:
    """A local directory as it is, or a hub id brought into the hub's cache.

    Raises UserError if it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    looks_like_hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if path.exists() or not looks_like_hub_id:
        raise UserError(
            f"no such directory: {model}; --model takes a checkpoint directory or a hub id such as org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as problem:
        raise UserError(
            f"{model} is not a directory here, and the hub did not give it ({told(problem)}); name a local directory"
        ) from problem


def read_config(directory: Path, trust_remote_code: bool) -> Any:
    """The model's configuration; remote code in the source is run only with ``trust_remote_code``.

    Raises UserError for a missing or broken config.json, a quantized source, or an unknown model type.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} has no config.json; is it a Hugging Face checkpoint?")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{path} is not JSON ({problem}); bring the file again") from problem
    if not isinstance(raw, dict) or not raw.get("model_type"):
        raise UserError(f"{path} names no model_type; is it a Hugging Face checkpoint?")
    if raw.get("quantization_config"):
        raise UserError(f"{directory} is already quantized; bring the unquantized model")
    if str(raw["model_type"]).startswith("layerpress_"):
        raise UserError(
            f"{directory} was written by layerpress; compress the original model, or a copy from --export dense"
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except REFUSALS as problem:
        hint = "; if you trust its code, say --trust-remote-code" if "auto_map" in raw else ""
        raise UserError(f"transformers does not know the model in {directory}: {told(problem)}{hint}") from problem


# what transformers may raise of a config.json that it can make no model of
REFUSALS = (
    *(ValueError, KeyError, TypeError, OSError, AttributeError, AssertionError, IndexError, OverflowError),
    *(RuntimeError, ZeroDivisionError, StrictDataclassError),
)


class Source:
    """One checkpoint: headers, configuration and the skeleton.

    ``compute_dtype`` is the floating-point type in which layers are loaded to be run, ``device`` where (``on``). With
    ``separate_experts`` the weights of a mixture's experts, which transformers stacks, are seen as linears of their own, by name and
    in the model.
    """

    def __init__(
        self,
        directory: Path,
        compute_dtype: torch.dtype,
        trust_remote_code: bool = False,
        separate_experts: bool = False,
    ) -> None:
        self.directory = directory
        self.compute_dtype = compute_dtype
        self.device = CPU
        self.config = read_config(directory, trust_remote_code)
        self.tensors = read_headers(shard_paths(directory))
        layers = getattr(self.config.get_text_config(), "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > len(self.tensors):
            raise UserError(
                f"{directory / 'config.json'} asks for {layers} layers, but there are {len(self.tensors)} tensors; "
                "the two files do not belong together"
            )
        with init_empty_weights(include_buffers=False):
            try:
                model = AutoModelForCausalLM.from_config(
                    self.config, dtype=compute_dtype, trust_remote_code=trust_remote_code
                )
            except REFUSALS as problem:
                raise UserError(f"unsupported model class {type(self.config).__name__}: {told(problem)}") from problem
        self.model: Any = model.eval().requires_grad_(False)
        self.tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", {}) or {})
        self._conversions = get_model_conversion_mapping(self.model)
        self._sources, self.unused = self._match_keys()
        self._check_complete()
        stacked = [(path, module) for path, module in self.model.named_modules() if stacks_experts(module)]
        # path: the module of transformers, and ours in its place
        self.experts = {path: (module, Experts(module)) for path, module in stacked if separate_experts}
        self._place_experts(stacked=False)

    @property
    def source_dtype(self) -> torch.dtype:
        """The dtype that holds most bytes on disk."""
        sizes: dict[torch.dtype, int] = {}
        for item in self.tensors.values():
            sizes[item.dtype] = sizes.get(item.dtype, 0) + item.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that the model uses, tied ones once."""
        return sum(item.nbytes for items in self._sources.values() for item in items)

    def _match_keys(self) -> tuple[dict[str, list[StoredTensor]], list[str]]:
        """Model parameter name -> stored tensors it is made of (several where transformers fuses them)."""
        names = self.model.state_dict()
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        sources: dict[str, list[StoredTensor]] = {}
        unused = []
        for key, item in self.tensors.items():
            name, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, names)
            if name not in names or name in self.tied:
                unused.append(key)
            else:
                sources.setdefault(name, []).append(item)
        return sources, unused

    def _check_complete(self) -> None:
        for name, parameter in self.model.state_dict().items():
            if name in self.tied:
                continue
            stored = self._sources.get(name)
            if stored is None:
                if any(isinstance(entry, WeightConverter) for entry in self._conversions):
                    continue  # one stored tensor may become several parameters; load() reports what is missing
                raise UserError(
                    f"{self.directory} lacks tensor {name} of {type(self.model).__name__}; bring the whole checkpoint"
                )
            if (
                len(stored) == 1
                and stored[0].key in (name, name.split(".", 1)[-1])
                and stored[0].shape != tuple(parameter.shape)
            ):
                raise UserError(
                    f"tensor {stored[0].key} is {list(stored[0].shape)} on disk but config.json asks for {list(parameter.shape)}; "
                    "the two files do not belong together"
                )

    def stored(self, name: str) -> StoredTensor:
        """The one stored tensor behind a parameter name (KeyError where transformers fuses several)."""
        items = self._sources[name]
        if len(items) != 1:
            raise KeyError(name)
        return items[0]

    @property
    def base_path(self) -> str:
        """The attribute of the model that is its decoder; not every class of transformers gives it the name that it says."""
        prefix: str = self.model.base_model_prefix
        return prefix if hasattr(self.model, prefix) else next(name for name, _ in self.model.named_children())

    def _place_experts(self, stacked: bool) -> None:
        """Put transformers' experts into the model, or ours."""
        for path, modules in self.experts.items():
            self.model.set_submodule(path, modules[0 if stacked else 1])

    def _stock_name(self, name: str) -> str:
        """What transformers calls the parameter that a name is part of: that of an expert is in a stack."""
        for path in self.experts:
            if name.startswith(path + "."):
                linear, leaf = name.split(".")[-2:]
                return f"{path}.{linear}_bias" if leaf == "bias" else f"{path}.{linear}"
        return name

    def _unstack(self) -> None:
        """Give our experts' linears views of the stacks that are loaded."""
        for stacked, ours in self.experts.values():
            for name in stacked_names(stacked):
                stack = stacked._parameters[name]
                if stack.is_meta:
                    continue
                linear, leaf = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
                turned = stacked.is_transposed and leaf == "weight"
                for number, part in enumerate(stack.detach()):
                    own = nn.Parameter(part.T if turned else part, requires_grad=False)
                    ours.get_submodule(f"{number}.{linear}")._parameters[leaf] = own
                empty = torch.empty(stack.shape, dtype=self.compute_dtype, device="meta")
                stacked._parameters[name] = nn.Parameter(empty, requires_grad=False)

    def all_stored(self, name: str) -> list[StoredTensor]:
        """The stored tensors behind a parameter name; several where transformers fuses them."""
        return self._sources[name]

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype on disk of the tensor, or the first of the tensors, behind a parameter name."""
        items = self._sources.get(self._stock_name(name))
        return items[0].dtype if items else self.source_dtype

    def used_tensors(self) -> list[StoredTensor]:
        """Every stored tensor that the model uses, in the order of the source's keys."""
        used = {item.key for items in self._sources.values() for item in items}
        return [item for key, item in self.tensors.items() if key in used]

    def read(self, item: StoredTensor) -> torch.Tensor:
        """One stored tensor as it is on disk."""
        return next(tensor for _, tensor in read_tensors([item]))

    def parameter_names(self, prefixes: Iterable[str]) -> list[str]:
        """State-dict names at or under the paths of modules or tensors, each once.

        Only what is under the paths is walked through: of a whole model's names a list takes milliseconds, for every layer.
        """
        names: dict[str, None] = {}
        for path in prefixes:
            parent, _, own = path.rpartition(".")
            found = getattr(self.model.get_submodule(parent), own)
            names |= dict.fromkeys(found.state_dict(prefix=f"{path}.") if isinstance(found, nn.Module) else [path])
        return list(names)

    def load(self, prefixes: Iterable[str], keep_source_dtype: bool = False) -> None:
        """Bring the parameters under ``prefixes`` into the skeleton.

        In ``compute_dtype`` on ``device``, or, for writing, in each tensor's own dtype on disk and in the host's memory.
        Raises UserError when a parameter finds no tensor or a shape does not fit.
        """
        names = self.parameter_names(prefixes)
        origins = {name: self.tied.get(name, name) for name in names}
        stock = list(dict.fromkeys(self._stock_name(origin) for origin in origins.values()))
        state = dict(read_tensors([item for origin in stock for item in self._sources.get(origin, [])]))
        settings = LoadStateDictConfig(
            dtype=self.compute_dtype,
            device_map={"": "cpu" if keep_source_dtype else self.device},
            weight_mapping=self._conversions,
        )
        self._place_experts(stacked=True)
        try:
            for origin in stock if keep_source_dtype else ():
                if origin in self._sources:
                    shape, dtype = self.tensor(origin).shape, self._sources[origin][0].dtype
                    self._set(origin, torch.empty(shape, dtype=dtype, device="meta"))
            info, _ = convert_and_load_state_dict_in_model(self.model, state, settings)
            del state
            self._unstack()
        finally:
            self._place_experts(stacked=False)
        if info.mismatched_keys or info.conversion_errors:
            problem = next(iter(info.mismatched_keys or info.conversion_errors))
            raise UserError(f"{self.directory} does not fit {type(self.model).__name__}: {problem}")
        for name, origin in origins.items():
            tensor = self.tensor(origin)
            if tensor.is_meta:
                raise UserError(
                    f"{self.directory} lacks tensor {name} of {type(self.model).__name__}; bring the whole checkpoint"
                )
            tensor.requires_grad_(False)
            if name != origin:
                self._set(name, tensor)

    def evict(self, prefixes: Iterable[str]) -> None:
        """Put the parameters under ``prefixes`` back to the meta device (and the origins of tied ones)."""
        for name in self.parameter_names(prefixes):
            for each in {name, self.tied.get(name, name)}:
                self._set(each, torch.empty(self.tensor(each).shape, dtype=self.compute_dtype, device="meta"))
        release_memory()
        if self.device.type != "cpu":
            torch.cuda.empty_cache()

    @contextmanager
    def loaded(self, prefixes: Iterable[str], keep_source_dtype: bool = False) -> Iterator[None]:
        """``load`` on entry, ``evict`` on exit."""
        paths = list(prefixes)
        self.load(paths, keep_source_dtype)
        try:
            yield
        finally:
            self.evict(paths)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Load and run layers on another device for a while; the model's own buffers (rotary frequencies) go there too."""
        before, buffers = self.device, {name: item for name, item in self.model.named_buffers() if not item.is_meta}
        self.device = device
        if (
            device.type != "cpu"
        ):  # torch loads its solvers at the first call, which must not be several threads' (pytorch#90613)
            torch.linalg.cholesky(torch.eye(1, device=device))
        for name, item in buffers.items():
            self._set(name, item.to(device))
        try:
            yield
        finally:
            self.device = before
            for name, item in buffers.items():
                self._set(name, item)

    @contextmanager
    def zeros(self, prefixes: Iterable[str], rows_differ: bool = False) -> Iterator[None]:
        """Parameters under ``prefixes`` as zeros that take no memory: enough to see what a forward calls.

        A matrix is one zero, expanded; with ``rows_differ`` 0 and 1 by turns along its rows, so that the embeddings of two tokens
        differ. Fused experts (3-D) go to kernels that ask for real strides: theirs are untouched pages of the operating system's
        zeroes.
        """
        names = [name for name in self.parameter_names(prefixes) if self.tensor(name).is_meta]
        for name in names:
            shape = self.tensor(name).shape
            if len(shape) == 2 and rows_differ:
                self._set(
                    name, (torch.arange(shape[0], device=self.device) % 2).to(self.compute_dtype)[:, None].expand(shape)
                )
            elif len(shape) < 3:
                self._set(name, torch.zeros((), dtype=self.compute_dtype, device=self.device).expand(shape))
            else:
                pages = np.zeros(shape.numel() * self.compute_dtype.itemsize, dtype=np.uint8)
                self._set(name, torch.from_numpy(pages).to(self.device).view(self.compute_dtype).view(shape))
        try:
            yield
        finally:
            for name in names:
                self._set(name, torch.empty(self.tensor(name).shape, dtype=self.compute_dtype, device="meta"))

    @contextmanager
    def substituted(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Other tensors, for a while, in place of those of the named parameters that are loaded, and of what is tied to them."""
        kept: dict[str, torch.Tensor] = {}
        for name in (*weights, *(tied for tied, origin in self.tied.items() if origin in weights)):
            tensor = self.tensor(name)
            if not tensor.is_meta:
                kept[name] = tensor
                self._set(name, weights[self.tied.get(name, name)].to(tensor.device, tensor.dtype))
        try:
            yield
        finally:
            for name, tensor in kept.items():
                self._set(name, tensor)

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter or buffer by its state-dict name; on the meta device unless loaded."""
        path, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(path), leaf)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor.detach()
        else:
            module._parameters[leaf] = (
                tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            )
