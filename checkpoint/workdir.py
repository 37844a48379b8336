"""The work directory: durable records of finished layers, guarded by a fingerprint and a lock."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from checkpoint import processes
from checkpoint.errors import UserError
from checkpoint.files import publish, write_json
from checkpoint.tensorfile import write_tensors

FINGERPRINT = "fingerprint.json"
BEGUN = {"lock", f"{FINGERPRINT}.tmp"}  # all that is in a directory whose run was killed before it had a fingerprint


class WorkDirectory:
    """Records ``(stage, index) -> tensors`` that survive a kill: data, fsync, then the name.

    Opening takes a lock that dies with the process. Raises UserError if another process holds it, if the
    directory is not ours, or if it was made from other weights, text or settings (naming what differs).
    Of several processes that share a job the main one does all that; the others only read.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], fresh: bool) -> None:
        self.path = path
        if processes.is_main():
            self._take(path / FINGERPRINT, fingerprint, fresh)
        processes.wait()

    def _take(self, recorded: Path, fingerprint: Mapping[str, Any], fresh: bool) -> None:
        path = self.path
        if path.exists() and not recorded.is_file() and any(item.name not in BEGUN for item in path.iterdir()):
            raise UserError(f"{path} exists and is not a layerpress work directory; name another with --work-dir")
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise UserError(
                f"another layerpress run is using {path}; wait for it or name another --work-dir"
            ) from problem
        if fresh:
            for item in path.iterdir():
                if item.name != "lock":
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
        if recorded.is_file():
            self._compare(self._read(recorded), fingerprint)
        else:
            write_json(recorded, dict(fingerprint))

    def _read(self, recorded: Path) -> dict[str, Any]:
        try:
            found = json.loads(recorded.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise UserError(f"{recorded} is damaged ({problem}); say --fresh to start again") from problem
        if not isinstance(found, dict):
            raise UserError(f"{recorded} is damaged (it holds no fingerprint); say --fresh to start again")
        return found

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        different = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if different:
            told = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in different)
            raise UserError(
                f"{self.path} holds the work of another run ({told}); say --fresh to start again, or name another --work-dir"
            )

    def _file(self, stage: str, index: int) -> Path:
        return self.path / stage / f"{index:04d}.safetensors"

    def done(self, stage: str, index: int) -> bool:
        """Whether the record is there, whole."""
        return self._file(stage, index).exists()

    def leading(self, stage: str, count: int) -> int:
        """How many of the records 0 ... ``count`` - 1 are there before the first that is missing."""
        return next((index for index in range(count) if not self.done(stage, index)), count)

    def put(self, stage: str, index: int, tensors: dict[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
        """Store a record durably; ``notes`` is anything JSON can hold."""
        path = self._file(stage, index)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        write_tensors(temporary, tensors, {"notes": json.dumps(notes)})
        publish(temporary, path)

    def aside(self, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same tensors, mapped from a file that has no name any more: the system has their memory until they are read.

        ``name`` is whose they are: no two may be put aside under one name at a time.
        """
        path = self.path / f"aside-{name}-{processes.index()}.tmp"
        try:
            write_tensors(path, tensors, {})
            with safe_open(path, framework="pt") as handle:
                return {key: handle.get_tensor(key) for key in tensors}
        finally:
            path.unlink(missing_ok=True)

    def get(
        self, stage: str, index: int, ending: str | tuple[str, ...] = "", starting: str = ""
    ) -> dict[str, torch.Tensor]:
        """The tensors of a record whose names start and end so; raises UserError if it was damaged."""
        return read_record(self._file(stage, index), lambda name: name.startswith(starting) and name.endswith(ending))

    def notes(self, stage: str, index: int) -> dict[str, Any]:
        """The notes of a record; reads the header alone."""
        path = self._file(stage, index)
        try:
            with safe_open(path, framework="pt") as handle:
                return json.loads((handle.metadata() or {})["notes"])
        except (SafetensorError, OSError, KeyError, ValueError) as problem:
            raise UserError(f"record {path} is damaged ({problem}); say --fresh to start again") from problem

    def close(self) -> None:
        """Release the lock; the records stay."""
        if processes.is_main():
            self._lock.close()


def read_record(path: Path, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The tensors of a file whose names are ``wanted``; raises UserError if it was damaged."""
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise UserError(f"record {path} is damaged ({problem}); say --fresh to start again") from problem


def free_bytes(path: Path) -> int:
    """Bytes free on the file system that holds (or will hold) ``path``."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    status = os.statvfs(existing)
    return status.f_bavail * status.f_frsize
