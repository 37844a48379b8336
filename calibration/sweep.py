"""Replays the decoder one layer at a time: the calls are recorded once, hidden states come from files.

One sweep serves both modes. The sequential mode is the loop that installs what it compressed, so that
later groups of the same layer and all later layers see it; the one-shot mode never installs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibration.moments import GroupCollector, Moments
from calibration.store import HiddenStates
from calibration.structure import Group, Layer, Stop, Structure, first_of, patched_forwards, split_call
from calibration.windows import Windows
from checkpoint.files import fsync_directory
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
                self._forward(torch.zeros(batch, self.length, dtype=torch.int64), [stub] * len(self._modules))
            self._calls[batch] = recorded
        return self._calls[batch]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The first layer's input ``(windows, length, width)``; the front's weights must be loaded."""
        caught: list[torch.Tensor] = []

        def stub(*args: Any, **kwargs: Any) -> Any:
            caught.append(split_call(args, kwargs)[0])
            raise Stop

        self._forward(ids, [stub] * len(self._modules))
        return caught[0]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the last layer's output; the back's weights must be loaded.

        The front runs on zeros where its weights are not loaded: what it gives is thrown away.
        """

        def stub(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self.structure.returns_tuple else hidden

        with self.source.zeros(self.structure.front), torch.no_grad():
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
            with patched_forwards(self._modules, [stub] * len(self._modules)):
                return self.source.model(input_ids=ids, use_cache=False).logits

    def run_layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Output of layer ``index``, whose weights must be loaded."""
        args, kwargs = self.calls(hidden.shape[0])[index]
        return first_of(self._modules[index](hidden, *args, **kwargs))

    def _forward(self, ids: torch.Tensor, forwards: list[Callable[..., Any]]) -> None:
        try:
            with torch.no_grad(), patched_forwards(self._modules, forwards):
                self.source.model(input_ids=ids, use_cache=False)
        except Stop:
            pass


@torch.no_grad()
def streamed_logits(
    source: Source, structure: Structure, ids: torch.Tensor, prepare: Callable[[OpenLayer], None]
) -> torch.Tensor:
    """Logits ``(windows, length, vocabulary)`` for a few windows, one layer in memory.

    ``prepare`` is called with each open layer before it runs: the place to install parts.
    """
    replay = Replay(source, structure, ids.shape[1])
    with source.loaded(structure.front):
        hidden = replay.embed(ids)
    for layer in structure.layers:
        with opened(source, layer) as open_layer:
            prepare(open_layer)
            hidden = replay.run_layer(layer.index, hidden)
    with source.loaded(structure.back):
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


class Sweep:
    """Hidden states of the calibration windows, from the embedding through the layers, in ``directory``.

    Files ``0000.bin`` ... hold each layer's input. ``micro_batch`` windows run at a time: a function of
    the flags alone, never of free memory, so that the same flags give the same bytes.
    """

    def __init__(
        self, source: Source, structure: Structure, windows: Windows, directory: Path, micro_batch: int
    ) -> None:
        self._source, self._structure, self._ids = source, structure, windows.ids
        self._directory, self._micro_batch = directory, micro_batch
        self._replay = Replay(source, structure, windows.ids.shape[1])
        self._width = 0
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        """The file of layer ``index``'s input; complete if it exists."""
        return self._directory / f"{index:04d}.bin"

    def embed(self) -> None:
        """Write the first layer's input, unless it is there."""
        if self.path(0).exists():
            return
        with self._source.loaded(self._structure.front):
            self._produce(0, lambda first, count: self._replay.embed(self._ids[first : first + count]))

    def collect(
        self, open_layer: OpenLayer, groups: Iterable[Group], needs: frozenset[str], advance: bool
    ) -> dict[str, Moments]:
        """Run the layer over all windows and return the moments of the groups' linears.

        With ``advance`` the layer's output is stored as the next layer's input in the same pass; without,
        each pass stops as soon as the groups have run.
        """
        wanted = list(groups)
        collectors = [
            GroupCollector({item.local: (item.d_out, item.d_in) for item in group.linears}, needs) for group in wanted
        ]
        modules = {item.local: open_layer.linear(item.local) for group in wanted for item in group.linears}
        handles = [handle for collector in collectors for handle in collector.hooks(modules)]
        if not advance:
            handles.append(modules[wanted[-1].linears[-1].local].register_forward_hook(_stop))
        try:
            if advance:
                self.advance(open_layer)
            else:
                self._read_through(open_layer)
        finally:
            for handle in handles:
                handle.remove()
        return {name: moments for collector in collectors for name, moments in collector.moments().items()}

    def advance(self, open_layer: OpenLayer) -> None:
        """Run the layer as it stands over all windows and store the next layer's input."""
        index = open_layer.layer.index
        with self._open(index) as states:
            self._produce(index + 1, lambda first, count: self._replay.run_layer(index, states.read(first, count)))

    def forget(self, index: int) -> None:
        """Delete the stored input of layer ``index``."""
        self.path(index).unlink(missing_ok=True)

    def close(self) -> None:
        """Delete what is stored: every layer is recorded."""
        shutil.rmtree(self._directory)

    def _read_through(self, open_layer: OpenLayer) -> None:
        index = open_layer.layer.index
        with self._open(index) as states, torch.no_grad():
            for first, count in self._batches():
                try:
                    self._replay.run_layer(index, states.read(first, count))
                except Stop:
                    continue

    def _batches(self) -> Iterator[tuple[int, int]]:
        total = self._ids.shape[0]
        for first in range(0, total, self._micro_batch):
            yield first, min(self._micro_batch, total - first)

    def _open(self, index: int, write: Path | None = None) -> HiddenStates:
        windows, length = self._ids.shape
        path = write or self.path(index)
        if not self._width:
            self._width = self.path(index).stat().st_size // (windows * length * self._source.compute_dtype.itemsize)
        return HiddenStates(path, windows, length, self._width, self._source.compute_dtype, write is not None)

    def _produce(self, index: int, make: Callable[[int, int], torch.Tensor]) -> None:
        temporary = self.path(index).with_suffix(".tmp")
        states = None
        with torch.no_grad():
            for first, count in self._batches():
                hidden = make(first, count)
                if states is None:
                    self._width = hidden.shape[-1]
                    states = self._open(index, write=temporary)
                states.write(first, hidden)
        assert states is not None
        with states:
            pass  # closing flushes to disk
        os.replace(temporary, self.path(index))
        fsync_directory(self._directory)


def _stop(*_: Any) -> None:
    raise Stop
