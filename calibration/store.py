"""Hidden states in plain files: mapped pages would count as resident memory, read buffers are reused."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch

from checkpoint.device import CPU
from checkpoint.shards import as_bytes

BEGIN_WRITING = hasattr(os, "posix_fadvise")  # not on macOS


class HiddenStates:
    """A file of ``(windows, length, width)`` numbers, written and read a few windows at a time."""

    def __init__(
        self,
        path: Path,
        windows: int,
        length: int,
        width: int,
        dtype: torch.dtype,
        write: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.windows, self.length, self.width, self.dtype = windows, length, width, dtype
        self._device = device
        self._window_bytes = length * width * dtype.itemsize
        self._buffer = torch.empty(0, dtype=dtype)
        self._file = path.open("wb" if write else "rb", buffering=0)

    def read(self, first: int, count: int) -> torch.Tensor:
        """Windows ``first`` to ``first + count``, ``(count, length, width)``, in a buffer that the next call reuses, or copied to
        ``device``.

        Raises OSError if the file is shorter than it should be.
        """
        size = count * self.length * self.width
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=self.dtype)
        part = self._buffer[:size]
        view = as_bytes(part)
        self._file.seek(first * self._window_bytes)
        done = 0
        while done < len(view):
            read = self._file.readinto(view[done:])
            if not read:
                raise OSError(f"{self._file.name} ends too early; start again with --fresh")
            done += read
        return part.view(count, self.length, self.width).to(self._device)

    def write(self, first: int, hidden: torch.Tensor) -> None:
        """Store ``(count, length, width)`` hidden states as windows ``first`` and following."""
        view = as_bytes(hidden.to("cpu", self.dtype))
        self._file.seek(first * self._window_bytes)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        if BEGIN_WRITING:  # the disk begins while the next windows are computed: the flush at the end has little left
            os.posix_fadvise(self._file.fileno(), first * self._window_bytes, done, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file.writable() and kind is None:
            os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        """Close the file; for one that need not outlive the process, which nothing has to wait for."""
        self._file.close()
