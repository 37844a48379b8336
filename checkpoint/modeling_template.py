"""A model whose linear maps may be of low rank, packed integers, or have fewer channels; written by layerpress.

This one file, beside config.json, is all that transformers needs (``trust_remote_code=True``). The three base
classes below and ``model_type`` are filled in when the checkpoint is written; everything else is generic.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseForCausalLM
from transformers import LlamaModel as BaseModel

FORMAT = 3
PREFIX = "model"  # the attribute of the language model that is the decoder


class LayerpressConfig(BaseConfig):
    """The base model's configuration plus ``layerpress``: the format, and how every compressed linear is stored.

    ``runtime``: packed weights become ``dense`` ones at their first use, or stay ``packed`` for torch's int4 kernel on a CPU (less
    memory, for the few rows at a time of decoding); ``from_pretrained(DIR, runtime="packed")`` says otherwise than config.json.
    """

    model_type = "layerpress_llama"
    runtime = "dense"


def grid_shapes(d_out: int, d_in: int, grid: dict[str, Any]) -> dict[str, tuple[torch.dtype | None, tuple[int, ...]]]:
    """What a packed ``(d_out, d_in)`` weight holds: name to dtype (None: the model's) and shape; packed 32 bits to a word.

    Codes are packed along a row, zero points along a column, as compressed-tensors does it.
    """
    bits, groups = grid["bits"], d_in // grid["group_size"] if grid["group_size"] else 1
    shapes: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (d_out, -(-d_in * bits // 32))),
        "weight_scale": (torch.uint8 if grid["power_of_two"] else None, (d_out, groups)),
    }
    if not grid["symmetric"]:
        shapes["weight_zero_point"] = (torch.int32, (-(-d_out * bits // 32), groups))
    return shapes


def unpack(packed: torch.Tensor, bits: int, shape: tuple[int, int], dim: int) -> torch.Tensor:
    """Signed codes, int8 of ``shape``, packed along ``dim``."""
    try:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    except ImportError as problem:
        raise ImportError("this checkpoint holds packed integers: pip install compressed-tensors") from problem
    if dim == 1:
        return unpack_from_int32(packed, bits, torch.Size(shape))
    # transposed here: a single word turned over by a view alone is more than version 0.20 can unpack
    words = packed.T.clone(memory_format=torch.contiguous_format)
    return unpack_from_int32(words, bits, torch.Size(shape[::-1])).T


class PackedWeight:
    """What modules with a packed ``(d_out, d_in)`` weight share; mixed into a module.

    A weight is ``(code - zero point) * scale``; scales that are powers of two are stored as their exponents plus 127. It is
    unpacked at its first use and kept; modules whose weights are offloaded do it each time.
    """

    weight_packed: torch.Tensor
    kept: torch.Tensor | None

    def hold(self: Any, name: str, d_out: int, d_in: int, grid: dict[str, Any] | None, device: Any, dtype: Any) -> None:
        """Register the tensors of a weight: packed, or as it is without a grid."""
        self.kept = None
        if grid is None:
            self.register_parameter(name, nn.Parameter(torch.zeros(d_out, d_in, device=device, dtype=dtype)))
            return
        for key, (own, shape) in grid_shapes(d_out, d_in, grid).items():
            self.register_buffer(
                name.removesuffix("weight") + key, torch.zeros(shape, device=device, dtype=own or dtype)
            )

    def levels(
        self: Any, name: str, d_out: int, d_in: int, grid: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes int8 ``(d_out, d_in)``, scales float32 ``(d_out, groups)`` and zero points (int8, or None) of a packed weight."""
        codes = unpack(getattr(self, f"{name}_packed"), grid["bits"], (d_out, d_in), 1)
        scale = getattr(self, f"{name}_scale")
        scale = torch.exp2(scale.float() - 127) if grid["power_of_two"] else scale.float()
        if grid["symmetric"]:
            return codes, scale, None
        return codes, scale, unpack(getattr(self, f"{name}_zero_point"), grid["bits"], (d_out, scale.shape[1]), 0)

    def held(self: Any, name: str, d_out: int, d_in: int, grid: dict[str, Any] | None) -> torch.Tensor:
        """A weight that was registered so, ``(d_out, d_in)`` in float32."""
        if grid is None:
            return getattr(self, name).float()
        codes, scale, zero = self.levels(name, d_out, d_in, grid)
        grouped = codes.float().unflatten(1, (scale.shape[1], -1))
        if zero is not None:
            grouped = grouped - zero.float().unsqueeze(2)
        return (grouped * scale.unsqueeze(2)).flatten(1)

    @torch.no_grad()
    def unpacked(self: Any, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight in ``dtype``, kept from the first time on."""
        kept = self.kept
        if kept is None or kept.dtype != dtype or kept.device != self.weight_packed.device:
            kept = self.dense().to(dtype)
            kept._is_hf_initialized = True  # transformers initialises what it takes for missing
            if not hasattr(self, "_hf_hook") and not kept.is_meta:
                self.kept = kept
        return kept


def kernel_group(d_out: int, d_in: int, grid: dict[str, Any]) -> int | None:
    """The group size in which torch's int4 kernel can hold a weight; None if in none."""
    group = grid["group_size"] or d_in
    return next((size for size in (256, 128, 64, 32) if group % size == 0 and d_out % 16 == 0), None)


def kernel_weights(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, size: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A weight for torch's int4 kernel, whose values are ``(q - 8) * scale + shift`` with q from 0 to 15: ``(q, scales and shifts)``.

    More than 4 bits are two such weights that add up, for ``code = 16 high + low``.
    """
    shift = torch.zeros_like(scale) if zero is None else -zero.float() * scale
    whole = codes.int()
    parts = [(whole + 8, scale, shift)]
    if bits > 4:
        parts = [((whole >> 4) + 8, 16 * scale, shift), (whole & 15, scale, 8 * scale)]
    found = []
    for q, step, offset in parts:
        both = torch.stack([step.T, offset.T], 2).repeat_interleave(codes.shape[1] // size // scale.shape[1], dim=0)
        tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.contiguous(), 1)
        found.append((tiles, both.to(dtype).contiguous()))
    return found


class PackedLinear(PackedWeight, nn.Module):
    """``y = W x + b`` with packed ``W``, and perhaps a correction of low rank that is added to it.

    The correction's factors ``(rank, d_in)`` and ``(d_out, rank)`` are this module's own, plain or packed.
    """

    stays_packed = False
    kernel: tuple[list[Any], list[torch.Tensor]] | None = None

    def __init__(
        self, d_in: int, d_out: int, spec: dict[str, Any], bias: bool, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = d_in, d_out, spec
        self.hold("weight", d_out, d_in, spec["weight"], device, dtype)
        self.bias = nn.Parameter(torch.zeros(d_out, device=device, dtype=dtype)) if bias else None
        rank = spec.get("rank", 0)
        if rank:
            self.hold("factor_in_weight", rank, d_in, spec.get("factors"), device, dtype)
            self.hold("factor_out_weight", d_out, rank, spec.get("factors"), device, dtype)

    def dense(self) -> torch.Tensor:
        """The weight ``(d_out, d_in)`` in float32, correction and all."""
        d_in, d_out, rank, grid = (
            self.in_features,
            self.out_features,
            self.spec.get("rank", 0),
            self.spec.get("factors"),
        )
        weight = self.held("weight", d_out, d_in, self.spec["weight"])
        if not rank:
            return weight
        return weight + self.held("factor_out_weight", d_out, rank, grid) @ self.held(
            "factor_in_weight", rank, d_in, grid
        )

    @torch.no_grad()
    def _for_kernel(self, size: int, dtype: torch.dtype) -> tuple[list[Any], list[torch.Tensor]]:
        """What the kernel multiplies by, and the correction's factors in ``dtype``; kept from the first time on."""
        if self.kernel is not None and self.kernel[0][0][1].dtype == dtype:
            return self.kernel
        d_in, d_out, rank = self.in_features, self.out_features, self.spec.get("rank", 0)
        grid, of_factors = self.spec["weight"], self.spec.get("factors")
        weights = kernel_weights(*self.levels("weight", d_out, d_in, grid), grid["bits"], size, dtype)
        shapes = {"factor_in_weight": (rank, d_in), "factor_out_weight": (d_out, rank)} if rank else {}
        made = weights, [self.held(name, *shape, of_factors).to(dtype) for name, shape in shapes.items()]
        if not hasattr(self, "_hf_hook"):
            self.kernel = made
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., d_in)`` to ``(..., d_out)``."""
        size = kernel_group(self.out_features, self.in_features, self.spec["weight"]) if self.stays_packed else None
        if size is None or x.device.type != "cpu":
            return nn.functional.linear(x, self.unpacked(x.dtype), self.bias)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        weights, factors = self._for_kernel(size, x.dtype)
        products = [torch.ops.aten._weight_int4pack_mm_for_cpu(rows, tiles, size, steps) for tiles, steps in weights]
        if factors:
            products.append(rows @ factors[0].T @ factors[1].T)
        y = torch.stack(products).sum(0) if len(products) > 1 else products[0]
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)


class PackedTable(PackedWeight):
    """What an embedding, of whatever class, becomes when its weight is packed: it keeps that class's forward."""

    weight_scale: torch.Tensor
    num_embeddings: int
    embedding_dim: int
    grid: dict[str, Any]

    def dense(self) -> torch.Tensor:
        """The table ``(rows, width)`` in float32."""
        return self.held("weight", self.num_embeddings, self.embedding_dim, self.grid)

    @property
    def weight(self) -> torch.Tensor:
        """The table in the dtype of its scales."""
        return self.unpacked(self.weight_scale.dtype)


def pack_embedding(embedding: Any, grid: dict[str, Any]) -> None:
    """Make an embedding's weight a packed one."""
    weight, kind = embedding.weight, type(embedding)
    del embedding.weight
    embedding.__class__ = type(f"Packed{kind.__name__}", (PackedTable, kind), {})
    embedding.grid = grid
    embedding.hold("weight", *weight.shape, grid, weight.device, weight.dtype)


class TiedHead(nn.Module):
    """Logits from the packed weight of the embedding, which is stored once."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple it is no submodule of the head, whose tensors would be stored again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., width)`` to ``(..., vocabulary)``."""
        return nn.functional.linear(x, self._embedding[0].unpacked(x.dtype))


def linear(d_in: int, d_out: int, grid: dict[str, Any] | None, bias: bool, device: Any, dtype: Any) -> nn.Module:
    """A plain linear, or a packed one."""
    if grid is None:
        return nn.Linear(d_in, d_out, bias=bias, device=device, dtype=dtype)
    return PackedLinear(d_in, d_out, {"weight": grid}, bias, device, dtype)


class FactoredLinear(nn.Module):
    """``y = factor_out(factor_in(x))``: ``factor_in`` is ``(r, d_in)``, ``factor_out`` ``(d_out, r)``, plain or packed."""

    def __init__(
        self, d_in: int, d_out: int, spec: dict[str, Any], bias: bool, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.factor_in = linear(d_in, spec["rank"], spec.get("factors"), False, device, dtype)
        self.factor_out = linear(spec["rank"], d_out, spec.get("factors"), bias, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., d_in)`` to ``(..., d_out)``."""
        return self.factor_out(self.factor_in(x))


class PivotedLinear(nn.Module):
    """A product stored as r of its own rows (``factor_in``), from which the other rows follow (``factor_out``).

    ``factor_in`` is ``(r, d_in)``, ``factor_out`` ``(d_out - r, r)``, plain or packed; ``order`` (int32, ``(d_out,)``) says which of
    the r + (d_out - r) numbers so computed each output is.
    """

    order: torch.Tensor

    def __init__(
        self, d_in: int, d_out: int, spec: dict[str, Any], bias: bool, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, rank = d_in, d_out, spec["rank"]
        self.factor_in = linear(d_in, rank, spec.get("factors"), False, device, dtype)
        self.factor_out = linear(rank, d_out - rank, spec.get("factors"), False, device, dtype)
        self.register_buffer("order", torch.zeros(d_out, device=device, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(d_out, device=device, dtype=dtype)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., d_in)`` to ``(..., d_out)``."""
        kept = self.factor_in(x)
        computed = torch.cat([kept, self.factor_out(kept)], dim=-1)
        # on its side: torch selects rows several times faster than columns, which took as long as both products
        columns = computed.reshape(-1, self.out_features).T.contiguous()
        y = columns.index_select(0, self.order).T.contiguous().reshape(computed.shape)
        return y if self.bias is None else y + self.bias


def output_channels(
    d_in: int, d_out: int, spec: dict[str, Any], bias: bool, device: Any = None, dtype: Any = None
) -> nn.Linear:
    """A linear of which only some outputs are left."""
    return nn.Linear(d_in, spec["rank"], bias=bias, device=device, dtype=dtype)


def input_channels(
    d_in: int, d_out: int, spec: dict[str, Any], bias: bool, device: Any = None, dtype: Any = None
) -> nn.Linear:
    """A linear of which only some inputs are left."""
    return nn.Linear(spec["rank"], d_out, bias=bias, device=device, dtype=dtype)


MODULES: dict[str, Any] = {
    "factors": FactoredLinear,
    "pivoted": PivotedLinear,
    "packed": PackedLinear,
    "output-channels": output_channels,
    "input-channels": input_channels,
}


def check_grid(path: str, grid: Any, widths: tuple[int, ...]) -> None:
    """Raise ValueError unless ``grid`` is None or a grid whose groups divide every one of ``widths``."""
    if grid is None:
        return
    wanted = {"bits": int, "group_size": int, "symmetric": bool, "power_of_two": bool}
    if not isinstance(grid, dict) or {key: type(value) for key, value in grid.items()} != wanted:
        raise ValueError(f"config.json gives {path!r} the grid {grid!r}; it must have {', '.join(wanted)}")
    size = grid["group_size"]
    if not 2 <= grid["bits"] <= 8 or size < 0 or any(size and width % size for width in widths):
        raise ValueError(f"config.json gives {path!r} a grid that does not fit it: {grid!r}")


def settings_of(config: Any) -> dict[str, Any]:
    """What config.json says under ``layerpress``; raises ValueError if it is of another format."""
    settings = getattr(config, "layerpress", None)
    if (
        not isinstance(settings, dict)
        or settings.get("format") != FORMAT
        or not isinstance(settings.get("linears"), dict)
    ):
        raise ValueError(
            f"config.json does not hold layerpress settings of format {FORMAT}; bring the checkpoint again"
        )
    return settings


def stacks_experts(module: Any) -> bool:
    """Whether a module holds the weights of a mixture's experts stacked, as transformers' experts interface has them, and no more."""
    flags = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
    if any(not hasattr(module, flag) for flag in flags) or module.has_post_expert_norm:
        return False
    return {name for name, _ in module.named_parameters()} == set(stacked_names(module))


def stacked_names(module: Any) -> list[str]:
    """The stacked parameters: inner weight, outer weight, and their biases where there are any."""
    linears = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    return linears + [f"{name}_bias" for name in linears if module.has_bias]


def even_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of zeros after ``(n, d)``, so that few numbers of rows occur: oneDNN makes a kernel for each, and never lets go of it."""
    missing = -len(rows) % (128 if len(rows) > 128 else 16)
    return nn.functional.pad(rows, (0, 0, 0, missing)) if missing and len(rows) > 8 else rows  # by none it would copy


class ExpertLinear(nn.Linear):
    """A linear to which another number of tokens comes every time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(tokens, d_in)`` to ``(tokens, d_out)``."""
        return super().forward(even_rows(x))[: len(x)]


class Experts(nn.Module):
    """A mixture's experts, each with linears of its own (``N.gate_up_proj`` or ``N.up_proj``, and ``N.down_proj``).

    It stands in the place of ``stacked``, a module of transformers that stacks their weights; that one's gate is still used.
    """

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        self.num_experts = stacked.num_experts
        self._stacked = (stacked,)  # in a tuple it is no submodule
        self._inner, self._outer = stacked_names(stacked)[:2]
        for number in range(stacked.num_experts):
            expert = nn.Module()
            for name in (self._inner, self._outer):
                weight = getattr(stacked, name)
                d_out, d_in = weight.shape[:0:-1] if stacked.is_transposed else weight.shape[1:]
                made = ExpertLinear(d_in, d_out, bias=stacked.has_bias, device="meta", dtype=weight.dtype)
                expert.add_module(name, made.to_empty(device=weight.device))
            self.add_module(str(number), expert)

    def expert(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """What one expert makes of ``x`` ``(tokens, width)``."""
        expert, stacked = getattr(self, str(number)), self._stacked[0]
        inner = getattr(expert, self._inner)(x)
        return getattr(expert, self._outer)(stacked._apply_gate(inner) if stacked.has_gate else stacked.act_fn(inner))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """``(tokens, width)`` through the experts ``(tokens, k)`` that the router chose, weighted and summed."""
        summed = torch.zeros_like(hidden_states)
        for number in range(self.num_experts):
            tokens, places = torch.where(top_k_index == number)
            if len(tokens):
                found = self.expert(number, hidden_states[tokens]) * top_k_weights[tokens, places, None]
                summed.index_add_(0, tokens, found.to(summed.dtype))
        return summed


def separate_experts(root: nn.Module, paths: list[str]) -> None:
    """Give the experts at ``paths`` linears of their own. Raises ValueError for a path that holds no stacked experts."""
    modules = dict(root.named_modules())
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"config.json must list the paths of experts, not {paths!r}")
    for path in paths:
        stacked = modules.get(path)
        if stacked is None or not stacks_experts(stacked):
            raise ValueError(f"config.json names {path!r} as experts, which this model has not")
        root.set_submodule(path, Experts(stacked))
        stacked._parameters.clear()


def factorise(root: nn.Module, linears: dict[str, Any]) -> None:
    """Replace the modules named in ``linears`` (paths inside ``root``) by compressed ones.

    Raises ValueError for an unknown form, a path that is no linear map, an impossible rank or grid: before
    anything is allocated.
    """
    modules = dict(root.named_modules())
    for path, item in linears.items():
        form, rank = (item.get("form"), item.get("rank")) if isinstance(item, dict) else (None, None)
        module = modules.get(path)
        weight = getattr(module, "weight", None)
        if module is None or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            raise ValueError(f"config.json names {path!r} as compressed, which is no linear map of this model")
        if not isinstance(form, str) or form not in MODULES:
            raise ValueError(f"config.json gives {path!r} the form {form!r}; known are {', '.join(MODULES)}")
        as_stored = isinstance(module, (nn.Linear, nn.Embedding))
        d_out, d_in = weight.shape if as_stored else (weight.shape[1], weight.shape[0])
        largest = {"output-channels": d_out, "input-channels": d_in}.get(form, min(d_out, d_in))
        least = 0 if form == "packed" else 1
        if not isinstance(rank, int) or isinstance(rank, bool) or not least <= rank <= largest:
            raise ValueError(f"config.json gives {path!r} the rank {rank!r}; it must be {least} to {largest}")
        if (form == "packed") != ("weight" in item):
            raise ValueError(f"config.json must give {path!r} a grid if, and only if, it is packed")
        check_grid(path, item.get("weight"), (d_in,))
        check_grid(path, item.get("factors"), (d_in, rank))
        if isinstance(module, nn.Embedding):
            pack_embedding(module, item["weight"])
            continue
        bias = getattr(module, "bias", None) is not None or item.get("bias") is True
        root.set_submodule(path, MODULES[form](d_in, d_out, item, bias, weight.device, weight.dtype))


def choose_runtime(root: nn.Module, config: Any) -> None:
    """Tell packed linears whether to stay packed; raises ValueError for a runtime that is not known."""
    if config.runtime not in ("dense", "packed"):
        raise ValueError(f"runtime must be dense or packed, is {config.runtime!r}")
    for module in root.modules():
        if isinstance(module, PackedLinear):
            module.stays_packed = config.runtime == "packed"


class LayerpressModel(BaseModel):
    """The decoder without a head, with compressed linears."""

    config_class = LayerpressConfig
    base_model_prefix = PREFIX

    def __init__(self, config: LayerpressConfig) -> None:
        super().__init__(config)
        separate_experts(self, settings_of(config).get("experts", []))
        factorise(self, settings_of(config)["linears"])
        choose_runtime(self, config)


class LayerpressForCausalLM(BaseForCausalLM):
    """The language model, with compressed linears; ``head`` in the settings says what its head is, if that is compressed."""

    config_class = LayerpressConfig
    base_model_prefix = PREFIX

    def __init__(self, config: LayerpressConfig) -> None:
        super().__init__(config)
        settings = settings_of(config)
        base = getattr(self, PREFIX)
        separate_experts(base, settings.get("experts", []))
        factorise(base, settings["linears"])
        head = settings.get("head")
        path = next(path for path, module in self.named_modules() if module is self.get_output_embeddings())
        if head == "embedding":
            self.set_submodule(path, TiedHead(self.get_input_embeddings()))
        elif head is not None:
            factorise(self, {path: head})
        choose_runtime(self, config)
