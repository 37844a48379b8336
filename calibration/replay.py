"""Replays the model one layer at a time: the layers' calls are recorded once, on zero weights, and repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from calibration.structure import Layer, Stop, Structure, first_of, patched_forwards, split_call
from checkpoint.source import Source

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Replay:
    """The model's forward cut into embedding, layers and head, each run on its own weights only."""

    def __init__(self, source: Source, structure: Structure, length: int) -> None:
        self.source, self.structure, self.length = source, structure, length
        self._modules = [source.model.get_submodule(layer.path) for layer in structure.layers]
        self._calls: dict[int, list[Call]] = {}

    def calls(self, batch: int) -> list[Call]:
        """Every layer's arguments besides the hidden states, for ``batch`` windows; recorded on zero weights."""
        if batch not in self._calls:
            recorded: list[Call] = []

            def stub(*args: Any, **kwargs: Any) -> Any:
                hidden, rest, keywords = split_call(args, kwargs)
                recorded.append((rest, keywords))
                if len(recorded) == len(self._modules):
                    raise Stop
                return (hidden,) if self.structure.returns_tuple else hidden

            with self.source.zeros(self.structure.front):
                self._forward(self._no_ids(batch, self.length), [stub] * len(self._modules))
            self._calls[batch] = recorded
        return self._calls[batch]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The first layer's input ``(windows, length, width)``; the front's weights must be loaded."""
        caught: list[torch.Tensor] = []

        def stub(*args: Any, **kwargs: Any) -> Any:
            caught.append(split_call(args, kwargs)[0])
            raise Stop

        self._forward(ids.to(self.source.device), [stub] * len(self._modules))
        return caught[0]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the last layer's output, differentiable under autograd; the back's weights must be loaded.

        The front runs on zeros where its weights are not loaded: what it gives is thrown away.
        """

        def stub(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self.structure.returns_tuple else hidden

        with self.source.zeros(self.structure.front):
            ids = self._no_ids(*hidden.shape[:2])
            with patched_forwards(self._modules, [stub] * len(self._modules)):
                return self.source.model(input_ids=ids, use_cache=False).logits

    def run_layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output of layer ``index``, whose weights must be loaded."""
        args, kwargs = self.calls(hidden.shape[0])[index]
        return first_of(self._modules[index](hidden, *args, **kwargs))

    def _no_ids(self, windows: int, length: int) -> torch.Tensor:
        return torch.zeros(windows, length, dtype=torch.int64, device=self.source.device)

    def _forward(self, ids: torch.Tensor, forwards: list[Callable[..., Any]]) -> None:
        try:
            with torch.no_grad(), patched_forwards(self._modules, forwards):
                self.source.model(input_ids=ids, use_cache=False)
        except Stop:
            pass


@torch.no_grad()
def streamed_logits(
    source: Source,
    structure: Structure,
    ids: torch.Tensor,
    prepare: Callable[[OpenLayer], None],
    without: Sequence[Layer] = (),
    ends: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits ``(windows, length, vocabulary)`` for a few windows, one layer in memory.

    ``prepare`` is called with each open layer before it runs: the place to install parts. Layers in ``without`` are passed by;
    ``ends`` are other weights of the embedding or the head, by parameter name.
    """
    replay = Replay(source, structure, ids.shape[1])
    with source.loaded(structure.front), source.substituted(ends or {}):
        hidden = replay.embed(ids)
    for layer in structure.layers:
        if layer in without:
            continue
        with opened(source, layer) as open_layer:
            prepare(open_layer)
            hidden = replay.run_layer(layer.index, hidden)
    with source.loaded(structure.back), source.substituted(ends or {}):
        return replay.head(hidden)


class OpenLayer:
    """A layer whose weights are in memory."""

    def __init__(self, source: Source, layer: Layer) -> None:
        self.layer = layer
        self.module: nn.Module = source.model.get_submodule(layer.path)
        self._replaced: dict[str, nn.Module] = {}

    def linear(self, local: str) -> nn.Module:
        """The original module of a linear, whatever is installed in its place."""
        return self._replaced.get(local, None) or self.module.get_submodule(local)

    def install(self, local: str, module: nn.Module) -> None:
        """Put ``module`` where the linear ``local`` was, until the layer is closed."""
        self._replaced.setdefault(local, self.module.get_submodule(local))
        self.module.set_submodule(local, module)

    @contextmanager
    def originals(self) -> Iterator[None]:
        """The original linears in their places for a while."""
        installed = {local: self.module.get_submodule(local) for local in self._replaced}
        for local, module in self._replaced.items():
            self.module.set_submodule(local, module)
        try:
            yield
        finally:
            for local, module in installed.items():
                self.module.set_submodule(local, module)

    def restore(self) -> None:
        """Put the original linears back."""
        for local, module in self._replaced.items():
            self.module.set_submodule(local, module)
        self._replaced.clear()


@contextmanager
def opened(source: Source, layer: Layer) -> Iterator[OpenLayer]:
    """Load a layer; on exit put its own linears back and evict it."""
    with source.loaded([layer.path]):
        open_layer = OpenLayer(source, layer)
        try:
            yield open_layer
        finally:
            open_layer.restore()
