"""A fault at every write, fsync, rename and removal of a run; what is left goes on, and ends in the same bytes. Prints a table.

    python benchmarks/faults.py [--every N]

Tiny models (tests/zoo.py), one recipe a mode. Every operation on a file of the work directory or the output is numbered; for each
and each kind of fault a forked child runs into it: it dies there (a write after half of its bytes), or the disk is full, or does not
work. Then nothing may stand under the final name, unless it is whole; the same command must end in the bytes of a run without faults.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

KILLED = 99
HALF = "half-backward.yaml"  # a recipe that sends half of the windows backward
FAULTS = {"killed": None, "disk full": errno.ENOSPC, "disk error": errno.EIO}
# recipe -> model and flags: forward, backward, backward on half of the windows, walks, a search, quantized with its ends
RUNS: dict[str, tuple[str, list[str]]] = {
    "svd-llm": ("llama", []),
    "loss-aware": ("gpt2", []),
    "half backward": ("llama", ["--recipe", f"{{directory}}/{HALF}"]),
    "llm-rom": ("qwen2", []),
    "lorap": ("llama", []),
    "svd-llm refitted": ("llama", ["--recipe", "svd-llm", "--refit", "anchored"]),
    "asvd-search": ("llama", ["--recipe", "asvd-search"]),
    "quantized": ("llama", ["--recipe", "quantized", "--group-size", "16", "--ratio-scope", "model"]),
    "gptq adapter": (
        "llama",
        ["--recipe", "gptq", "--group-size", "16", "--export", "adapter", "--target-ratio", "0.6"],
    ),
}


class Faults:
    """Numbers the operations on files under ``root``; at number ``at`` dies, or raises OSError of ``number``."""

    def __init__(self, root: Path, at: int | None, number: int | None) -> None:
        self._root, self._at, self._number, self.seen = str(root), at, number, 0

    def here(self, path: Any, first: Callable[[], object] = lambda: None) -> None:
        """One operation on ``path``; ``first`` is what is done of it before the fault."""
        if not str(path).startswith(self._root):
            return
        self.seen += 1
        if self.seen - 1 == self._at:
            first()
            if self._number is None:
                os._exit(KILLED)
            raise OSError(self._number, os.strerror(self._number), str(path))

    def install(self) -> None:
        """Into this process, for good: a forked child's."""
        for module, name in ((os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (shutil, "rmtree")):
            self._before(module, name)
        fsync, opened, copyfile = os.fsync, io.open, shutil.copyfile

        def fsync_at(descriptor: int) -> None:
            self.here(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def open_at(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            if not set(mode) & set("wax+"):
                return opened(file, mode, *more, **named)
            self.here(file)
            return Written(opened(file, mode, *more, **named), file, self)

        def copy_at(source: Any, target: Any, **named: Any) -> Any:
            self.here(target, lambda: Path(target).write_bytes(Path(source).read_bytes()[:10]))
            return copyfile(source, target, **named)

        os.fsync, io.open, shutil.copyfile = fsync_at, open_at, copy_at  # type: ignore[assignment]

    def _before(self, module: Any, name: str) -> None:
        original = getattr(module, name)

        def faulty(path: Any, *more: Any, **named: Any) -> Any:
            self.here(path)
            return original(path, *more, **named)

        setattr(module, name, faulty)


class Written:
    """A file whose writes are operations."""

    def __init__(self, file: Any, path: Any, faults: Faults) -> None:
        self._file, self._path, self._faults = file, path, faults

    def write(self, data: Any) -> Any:
        """All of ``data``, or half of it."""

        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._faults.here(self._path, half)
        return self._file.write(data)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def child(arguments: list[str], root: Path, at: int | None = None, number: int | None = None) -> tuple[int, int, str]:
    """Run the command in a forked child; its exit code, the operations it saw, and what it said."""
    told = root.with_suffix(".told")
    counted = root.with_suffix(".count")
    pid = os.fork()
    if not pid:
        code = 70
        with told.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
            try:
                faults = Faults(root, at, number)
                faults.install()
                import run_pipeline

                code = run_pipeline.main(arguments)
                counted.write_text(str(faults.seen))
            finally:  # whatever was raised goes no further than this process: the parent reads it
                if sys.exc_info()[0]:
                    traceback.print_exc()
                file.flush()
                os._exit(code)
    status = os.waitpid(pid, 0)[1]
    seen = int(counted.read_text()) if counted.exists() else 0
    return os.waitstatus_to_exitcode(status), seen, told.read_text()


def check_in_this_process(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The load check without a process of its own: it only reads."""
    from checkpoint import check

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = check.main(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), "")


def flags(name: str, more: list[str], model: Path, text: Path, root: Path) -> list[str]:
    """The command line of a run under ``root``."""
    given = ["--model", str(model), "--calibration", str(text), "--output", str(root / "out"), "--evaluate", "none"]
    given += ["--calibration-tokens", "256", "--sequence-length", "64", "--search-tokens", "128"]
    given += [] if "--recipe" in more else ["--recipe", name]
    given += [] if "--ratio-scope" in more else ["--ratio-scope", "decoder"]
    return [*given, *([] if "--target-ratio" in more else ["--target-ratio", "0.7"]), *more]


def suite(directory: Path, names: list[str], every: int) -> Iterator[tuple[str, int, int, list[str]]]:
    """Of each run: its name, its operations, the faults that were injected, and what went wrong."""
    import torch
    import zoo

    from compress import children

    torch.set_num_threads(1)  # a forked child has no threads but its own
    children.run_check = check_in_this_process
    text = zoo.write_text(directory / "text.txt", 3000)
    recipe = (ROOT / "configs" / "loss-aware.yaml").read_text(encoding="utf-8")
    (directory / HALF).write_text(re.sub("gradient_tokens: .*", "gradient_tokens: 128", recipe), encoding="utf-8")
    for name in names:
        architecture, given = RUNS[name]
        more = [item.format(directory=directory) for item in given]
        model = directory / f"model-{architecture}"
        if not model.exists():
            if not (pid := os.fork()):
                zoo.write_model(model, architecture, num_hidden_layers=2)
                os._exit(0)
            os.waitpid(pid, 0)
        root = directory / "run"
        root.mkdir()
        code, operations, told = child(flags(name, more, model, text, root), root)
        if code:
            raise RuntimeError(f"{name} fails without any fault: {told}")
        whole = zoo.content(root / "out")
        shutil.rmtree(root)
        wrong: list[str] = []
        points = [(at, fault) for at in range(0, operations, every) for fault in FAULTS]
        for at, fault in points:
            root.mkdir()
            arguments = flags(name, more, model, text, root)
            code, _, told = child(arguments, root, at, FAULTS[fault])
            lines = [item for item in told.splitlines() if item.startswith(("error:", "Traceback"))]
            expected = KILLED if fault == "killed" else 2
            if code not in (expected, 0) or (code == 2 and (len(lines) != 1 or lines[0].startswith("Traceback"))):
                wrong.append(f"{name}, {fault} at {at}: exit code {code}, {told[-300:]}")
            if (root / "out").exists() and zoo.content(root / "out") != whole:
                wrong.append(f"{name}, {fault} at {at}: something else stands under the final name")
            code, _, told = child(arguments, root)
            if code or zoo.content(root / "out") != whole:
                wrong.append(f"{name}, {fault} at {at}: the same command does not end in the same bytes: {told[-300:]}")
            shutil.rmtree(root)
        yield name, operations, len(points), wrong


def main() -> None:
    """All runs; exit code 1 if anything was lost."""
    from tables import line

    from eval.quiet import quiet_libraries

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take every so many operations (%(default)s)")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    options = parser.parse_args()
    quiet_libraries()
    line(["run", "operations", "faults injected", "survived"])
    line(["---"] * 4)
    lost: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        for name, operations, faults, wrong in suite(Path(directory), options.runs, options.every):
            line([name, operations, faults, faults - len({item.split(":")[0] for item in wrong})])
            lost += wrong
    for item in lost:
        print(item, file=sys.stderr)
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
