"""What a model is made of, found by running it once on weights of zero.

Nothing here knows a model by name. The decoder layers are the list of ``num_hidden_layers`` modules of
one class; which linears share an input, and in which order they run, is seen in a forward pass of a few
tokens through parameters that are zeros of one element's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from calibration.moments import module_weight
from calibration.roles import ENDS, ROUTER, role_of
from checkpoint.errors import UserError
from checkpoint.modeling_template import Experts, stacks_experts
from checkpoint.source import Source

PROBE_TOKENS = 4


class Stop(Exception):
    """Leaves a forward pass once it has shown what was wanted."""


@dataclass(frozen=True)
class Linear:
    """One linear map ``y = W x + b`` of a decoder layer; ``W`` is ``(d_out, d_in)`` whatever the storage.

    ``name`` is the module's path in the model, ``local`` its path in the layer; ``nbytes`` counts the
    weight as stored in the source, without the bias. ``role`` is from the table in roles.py. Of a mixture's expert ``mixture`` is the
    same for that linear of every expert of the layer, and ``share`` the part of all tokens that come to it on average.
    """

    name: str
    local: str
    layer: int
    d_out: int
    d_in: int
    transposed: bool
    has_bias: bool
    dtype: torch.dtype
    role: str
    mixture: str = ""
    share: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of the dense weight on disk."""
        return self.d_out * self.d_in * self.dtype.itemsize


@dataclass(frozen=True)
class Group:
    """Linears that see the same input, in the order in which they run."""

    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its module path and its groups in the order in which they run."""

    index: int
    path: str
    groups: tuple[Group, ...]

    @property
    def linears(self) -> list[Linear]:
        """All linears of the layer in running order."""
        return [linear for group in self.groups for linear in group.linears]


@dataclass(frozen=True)
class Structure:
    """Layers, what runs before and after them, and what is left dense with the reason.

    ``ends``: the embedding, and the head unless it is the same tensor, as if they were linears of one more layer.
    """

    layers: tuple[Layer, ...]
    front: tuple[str, ...]
    back: tuple[str, ...]
    returns_tuple: bool
    left_dense: tuple[tuple[str, str], ...]
    ends: tuple[Linear, ...]

    @property
    def linears(self) -> list[Linear]:
        """All linears of the decoder in running order."""
        return [linear for layer in self.layers for linear in layer.linears]


@contextmanager
def patched_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Replace each module's forward for a while; the module itself keeps its class and attributes."""
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states of a layer call, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def first_of(output: Any) -> torch.Tensor:
    """The hidden states in a layer's output: the output itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def find_layers(source: Source) -> tuple[str, nn.ModuleList]:
    """The path and the list of decoder layers.

    Raises UserError, saying what was found, unless exactly one list fits.
    """
    depth = getattr(source.config.get_text_config(), "num_hidden_layers", None)
    lists = [(path, module) for path, module in source.model.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(path, module) for path, module in lists if len(module) == depth and len({type(m) for m in module}) == 1]
    if len(fitting) != 1:
        found = ", ".join(
            f"{path} ({len(module)} x {type(module[0]).__name__})" for path, module in lists if len(module)
        )
        raise UserError(
            f"structure of {type(source.model).__name__} not understood: expected one list of num_hidden_layers = {depth} equal "
            f"decoder layers, found {found or 'no module list'}; layerpress cannot compress this model class"
        )
    return fitting[0]


def discover(source: Source) -> Structure:
    """Find layers, groups, and what stays dense; runs on zero weights, reads none.

    Raises UserError where the structure is not understood.
    """
    path, layers = find_layers(source)
    inside = tuple(f"{path}.{index}." for index in range(len(layers)))
    around = [name for name in source.model.state_dict() if not name.startswith(inside)]
    with source.zeros(around, rows_differ=True):  # or no argument would depend on the tokens
        _check_arguments(*(_probe_calls(source, path, list(layers), token)[0] for token in (0, 1)))
    with source.zeros(list(source.model.state_dict())):
        calls, front, returns_tuple = _probe_calls(source, path, list(layers))
        seen: dict[tuple[Any, ...], tuple[list[tuple[str, ...]], list[tuple[str, str]], dict[str, float]]] = {}
        found, left = [], []
        for index, layer in enumerate(layers):
            signature = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
            if signature not in seen:
                seen[signature] = _probe_layer(layer, *calls[index])
            groups, dense, mixtures = seen[signature]
            layer_path = f"{path}.{index}"
            found.append(
                Layer(
                    index,
                    layer_path,
                    tuple(_group(source, layer, layer_path, index, names, mixtures) for names in groups),
                )
            )
            left += [(f"{layer_path}.{name}", reason) for name, reason in dense]
    if not any(layer.groups for layer in found):
        raise UserError(
            f"no linear map was called in {type(layers[0]).__name__}; layerpress cannot compress this model class"
        )
    before = tuple(name for name in around if name.rpartition(".")[0] in front)
    after = tuple(name for name in around if name not in before)
    return Structure(tuple(found), before, after, returns_tuple, tuple(left), _ends(source, len(layers)))


def _ends(source: Source, index: int) -> tuple[Linear, ...]:
    """The embedding and the head, where they have a weight of their own in the source."""
    paths = {module: path for path, module in source.model.named_modules()}
    ends = []
    for role, module in zip(
        ENDS, (source.model.get_input_embeddings(), source.model.get_output_embeddings()), strict=True
    ):
        if isinstance(module, (nn.Embedding, nn.Linear)) and f"{paths[module]}.weight" not in source.tied:
            name, (rows, width) = paths[module], module.weight.shape
            has_bias = getattr(module, "bias", None) is not None
            dtype = source.stored_dtype(f"{name}.weight")
            ends.append(Linear(name, name, index, rows, width, False, has_bias, dtype, role))
    return tuple(ends)


def _group(
    source: Source, layer: nn.Module, layer_path: str, index: int, names: tuple[str, ...], mixtures: dict[str, float]
) -> Group:
    members = []
    for local in names:
        module = layer.get_submodule(local)
        d_out, d_in = module_weight(module).shape
        name = f"{layer_path}.{local}"
        dtype = source.stored_dtype(f"{name}.weight")
        transposed, has_bias = isinstance(module, Conv1D), module.bias is not None
        path = next((path for path in mixtures if local.startswith(path + ".")), None)
        kind = "" if path is None else f"{path}.{local.removeprefix(path + '.').partition('.')[2]}"
        share = 1.0 if path is None else mixtures[path]
        members.append(
            Linear(name, local, index, d_out, d_in, transposed, has_bias, dtype, role_of(local), kind, share)
        )
    return Group(tuple(members))


def _probe_calls(
    source: Source, path: str, layers: list[nn.Module], token: int = 0
) -> tuple[list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]], set[str], bool]:
    """Each layer's call, the module paths that run before the layers, and whether layers return a tuple."""
    last = len(layers) - 1
    for returns_tuple in (False, True):
        calls: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []
        chained: list[bool] = []
        front: set[str] = set()

        def stub(
            *args: Any, _tuple: bool = returns_tuple, _calls: Any = calls, _chained: Any = chained, **kwargs: Any
        ) -> Any:
            call = split_call(args, kwargs)
            if _calls:
                _chained.append(call[0] is _calls[-1][0])
            _calls.append(call)
            if len(_calls) > last or not all(_chained):
                raise Stop
            return (call[0],) if _tuple else call[0]

        def mark(module: nn.Module, _: Any, name: str = "", _front: set[str] = front) -> None:
            _front.add(name)

        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name, mark=mark: mark(module, args, name))
            for name, module in source.model.named_modules()
            if not name.startswith(path)
        ]
        try:
            with torch.no_grad(), patched_forwards(layers, [stub] * len(layers)):
                source.model(input_ids=torch.full((1, PROBE_TOKENS), token), use_cache=False)
        except Stop:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if len(calls) == len(layers) and all(chained):
            return calls, front, returns_tuple
    raise UserError(
        f"structure of {type(source.model).__name__} not understood: its {len(layers)} layers are not called one after the other "
        f"on the hidden states alone ({len(calls)} calls seen); layerpress cannot compress this model class"
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return []


def _check_arguments(first: list[Any], second: list[Any]) -> None:
    """Refuse layer arguments that depend on the tokens: replay records them once per batch shape."""
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        for a, b in zip(_tensors(one[1:]), _tensors(other[1:]), strict=True):
            if a.shape != b.shape or not torch.equal(a, b):
                raise UserError(
                    f"layer {index} takes an argument that depends on the tokens; layerpress cannot replay this model class"
                )


def _probe_layer(
    layer: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[tuple[str, ...]], list[tuple[str, str]], dict[str, float]]:
    """Groups of linears by shared input in running order, what is left dense, and each mixture's part of tokens an expert."""
    linears = {name: m for name, m in layer.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    groups: dict[tuple[Any, ...], list[str]] = {}
    alive = []

    def see(name: str, x: torch.Tensor) -> None:
        alive.append(x)  # keeps the storage from being reused, so that its address names it
        members = groups.setdefault((x.data_ptr(), tuple(x.shape), x._version), [])
        if name not in members:
            members.append(name)

    mixtures = {name: module for name, module in layer.named_modules() if isinstance(module, Experts)}
    shares: dict[str, float] = {}

    def every_expert(hidden: torch.Tensor, chosen: torch.Tensor, *_: Any, path: str) -> torch.Tensor:
        module = mixtures[path]
        shares[path] = chosen.shape[-1] / module.num_experts
        return sum((module.expert(i, hidden.clone()) for i in range(module.num_experts)), hidden)

    # a few tokens would not come to every expert
    forwards = [partial(every_expert, path=path) for path in mixtures]
    not_linear = set[str]()

    def check(name: str, y: Any) -> None:
        if not isinstance(y, torch.Tensor):
            not_linear.add(name)

    hooks = [m.register_forward_pre_hook(lambda _, a, name=name: see(name, a[0])) for name, m in linears.items()]
    hooks += [m.register_forward_hook(lambda _, a, y, name=name: check(name, y)) for name, m in linears.items()]
    before = [tensor.clone() for tensor in _tensors((args, kwargs))]
    try:
        with torch.no_grad(), patched_forwards(list(mixtures.values()), forwards):
            layer(hidden, *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    if any(not torch.equal(a, b) for a, b in zip(before, _tensors((args, kwargs)), strict=True)):
        raise UserError(
            f"{type(layer).__name__} changes its arguments, so its calls cannot be replayed; layerpress cannot compress it"
        )
    choices = {
        module.num_experts for module in layer.modules() if isinstance(module, Experts) or stacks_experts(module)
    }
    routers = {
        name
        for name, module in linears.items()
        if role_of(name) == ROUTER and module_weight(module).shape[0] in choices
    }
    called = {name for members in groups.values() for name in members}
    dense = [(name, "linear not called in a plain forward pass") for name in linears if name not in called]
    dense += [(name, "it does more than a linear map, as routers do") for name in sorted(not_linear)]
    dense += [(name, "a router chooses among experts, which no loss of a map measures") for name in sorted(routers)]
    for name, parameter in layer.named_parameters():
        if parameter.dim() >= 2 and name.rpartition(".")[0] not in linears:
            dense.append((name, f"parameter of shape {list(parameter.shape)} is not a linear map of one token"))
    plain = [tuple(name for name in members if name not in not_linear | routers) for members in groups.values()]
    return [members for members in plain if members], dense, shares
