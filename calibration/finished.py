"""Modules of an open layer that are as they will be: what they give is stored by one pass over it and read by the later ones.

A sequential walk passes over a layer once for every group of linears, and once more to its output. Without this its
attention would be computed by each pass after the group that reads attention's result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from calibration.replay import OpenLayer
from calibration.store import HiddenStates
from calibration.structure import first_of, patched_forwards


class Finished:
    """Outputs of an open layer's children, in files in ``directory`` that are deleted at the end.

    ``windows`` windows pass over the layer each time, ``micro_batch`` at a time. What is read is what was computed, to the bit.
    """

    def __init__(
        self, open_layer: OpenLayer, directory: Path, windows: int, micro_batch: int, device: torch.device
    ) -> None:
        self._open_layer = open_layer
        self._children = {
            name: child
            for name, child in open_layer.module.named_children()
            if any(_within(linear.local, name) for linear in open_layer.layer.linears)
        }
        self._directory, self._windows, self._micro_batch, self._device = directory, windows, micro_batch, device
        self._left = {linear.local for linear in open_layer.layer.linears}
        self._stored: dict[str, _Outputs] = {}

    def has(self, linears: Iterable[str]) -> None:
        """These linears, by local name, will not change any more."""
        self._left.difference_update(linears)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A pass over all windows. Children whose linears are all finished are read, or stored for the passes to come."""
        final = [name for name in self._children if not any(_within(local, name) for local in self._left)]
        read = [name for name in final if name in self._stored]
        written: dict[str, _Outputs] = {}
        with ExitStack() as stack:
            readers = [self._stored[name].reader(self._windows, self._micro_batch, self._device) for name in read]
            stack.enter_context(patched_forwards([self._children[name] for name in read], readers))
            runs_unfinished = self._watch_unfinished(stack)
            for name in set(final) - set(read) if self._left else ():  # no pass comes after one with nothing left
                written[name] = _Outputs(self._directory / f"finished-{name}.bin")
                stack.callback(written[name].close)
                writer = written[name].writer(self._windows, runs_unfinished)
                stack.callback(self._children[name].register_forward_hook(writer).remove)
            yield
        self._stored |= {name: outputs for name, outputs in written.items() if outputs.windows == self._windows}

    def _watch_unfinished(self, stack: ExitStack) -> Callable[[], bool]:
        """Asks whether an unfinished linear has run in the present micro-batch: what comes after may still change."""
        ran = False

        def note(seen: bool) -> None:
            nonlocal ran
            ran = seen

        module = self._open_layer.module
        stack.callback(module.register_forward_pre_hook(lambda *_: note(False)).remove)
        for local in self._left:
            stack.callback(module.get_submodule(local).register_forward_pre_hook(lambda *_: note(True)).remove)
        return lambda: ran

    def __enter__(self) -> Finished:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for outputs in self._stored.values():
            outputs.close()
            outputs.path.unlink()


def _within(local: str, child: str) -> bool:
    return local.startswith(f"{child}.")


class _Outputs:
    """One module's outputs in a file: hidden states, or a tuple of them and of nothing else."""

    def __init__(self, path: Path) -> None:
        self.path, self.windows = path, 0
        self._others: tuple[None, ...] | None = None
        self._shape, self._dtype = (0, 0), torch.float32
        self._states: HiddenStates | None = None

    def writer(self, windows: int, changes: Callable[[], bool]) -> Callable[[nn.Module, Any, Any], None]:
        """A forward hook that stores what it sees; what ``changes``, is no hidden states, or more, is not counted in ``windows``."""

        def write(_: nn.Module, __: Any, output: Any) -> None:
            y, others = first_of(output), output[1:] if isinstance(output, tuple) else None
            if changes() or y.dim() != 3 or any(other is not None for other in others or ()):
                return
            if self._states is None:
                self._others, self._shape, self._dtype = others, (y.shape[1], y.shape[2]), y.dtype
                self._states = HiddenStates(self.path, windows, *self._shape, self._dtype, write=True)
            self._states.write(self.windows, y)
            self.windows += len(y)

        return write

    def reader(self, windows: int, micro_batch: int, device: torch.device) -> Callable[..., Any]:
        """A forward that gives what was stored, micro-batch by micro-batch from the first."""
        self.close()
        states = self._states = HiddenStates(self.path, windows, *self._shape, self._dtype, device=device)
        firsts = iter(range(0, windows, micro_batch))

        def read(*_: Any, **__: Any) -> Any:
            first = next(firsts)
            y = states.read(first, min(micro_batch, windows - first))
            return y if self._others is None else (y, *self._others)

        return read

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._states is not None:
            self._states.close()
