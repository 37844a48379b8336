"""Compress a Hugging Face checkpoint: python run_pipeline.py --model DIR --target-ratio 0.8

The stages, in order: plan (everything validated and estimated), verify the weights, decompose layer by layer,
write, check in a fresh process, evaluate beside the dense model, report. Exit codes: 0 done, 2 the user's
input, 1 ours, 130 or 143 interrupted (the same command goes on from where it was), 141 nobody reads what is printed.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from checkpoint.environment import start_loading  # before anything that reads the environment

# what a disk may do in the middle of a run, and the remedy
DISK = {
    errno.ENOSPC: ("the disk is full", "free some room"),
    errno.EDQUOT: ("the quota of disk space is used up", "free some room"),
    errno.EFBIG: ("the file would be larger than this process may write", "raise the limit (ulimit -f)"),
    errno.EIO: ("the disk cannot be read or written", "see to it"),
    errno.EROFS: ("the disk can only be read", "make it writable"),
}


class Parser(argparse.ArgumentParser):
    """Tells a usage error in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Exit code 2 with one line."""
        self.exit(2, f"error: {message}; see --help\n")


def parser() -> argparse.ArgumentParser:
    """The command line; its flags are the recipe's fields."""
    from compress.recipe import CHOICES

    main = Parser(prog="layerpress", description=(__doc__ or "").split("\n")[0])
    what = main.add_argument_group("what")
    what.add_argument("--model", metavar="DIR|HUB_ID", help="the checkpoint; offline: a small one, as a package")
    what.add_argument(
        "--target-ratio", type=float, nargs="+", metavar="R", help="the part of the bytes to keep, e.g. 0.8"
    )
    what.add_argument(
        "--ratio-scope", choices=CHOICES["ratio_scope"], help="what R counts: the whole model, or the decoder's linears"
    )
    what.add_argument("--recipe", default="auto", metavar="NAME|FILE", help="the method (%(default)s)")
    what.add_argument("--allocation", choices=CHOICES["allocation"], help="how ranks are shared out")
    what.add_argument(
        "--form", choices=CHOICES["form"], help="how a product is stored: factors, or pivoted (fewer bytes)"
    )
    what.add_argument(
        "--refit", choices=CHOICES["refit"], help="refit outer factors on the compressed model's inputs, group by group"
    )
    what.add_argument("--bits", metavar="N,N", help="bits of packed weights, e.g. 4 or 2-4,8")
    what.add_argument("--group-size", metavar="N,N", help="inputs that share a scale (0: the whole row)")
    what.add_argument(
        "--correction-rank", metavar="N,N", help="ranks that make up for the quantization error, e.g. 32 or 0-64"
    )
    what.add_argument("--factor-bits", type=int, metavar="N", help="bits of their factors: 16, 8 or 4")
    what.add_argument("--list-recipes", action="store_true", help="print the recipes and exit")
    text = main.add_argument_group("calibration")
    text.add_argument(
        "--calibration",
        metavar="PATH|DATASET",
        help="text file, .jsonl, .parquet, NAME:CONFIG:SPLIT, offline or offline-tasks; several by comma",
    )
    text.add_argument("--calibration-tokens", type=int, metavar="N", help="how many tokens (65536)")
    text.add_argument("--sequence-length", type=int, metavar="L", help="tokens per window (512)")
    text.add_argument(
        "--fisher", choices=CHOICES["fisher"], help="labels of the loss gradient: drawn from the model, or the text's"
    )
    text.add_argument(
        "--search-tokens", type=int, metavar="N", help="how many of them a sensitivity search runs on (4096)"
    )
    text.add_argument("--seed", type=int, metavar="S", help="draws the windows (0)")
    out = main.add_argument_group("output")
    out.add_argument("--output", type=Path, metavar="DIR", help="./MODEL-RECIPE-RATIO by default")
    out.add_argument(
        "--export",
        choices=CHOICES["export"],
        help="factored (small), dense (stock architecture), or adapter (compressed-tensors and PEFT)",
    )
    out.add_argument(
        "--runtime", choices=CHOICES["runtime"], help="packed integers as used later: unpacked once, or kept packed"
    )
    out.add_argument(
        "--evaluate", metavar="PRESET|TASKS", help="quick, texts, papers, leaderboard, lm-eval tasks, or none"
    )
    job = main.add_argument_group("the job")
    job.add_argument("--work-dir", type=Path, metavar="DIR", help="where finished layers are kept (OUTPUT.work)")
    job.add_argument("--fresh", action="store_true", help="forget earlier work and replace an earlier output")
    job.add_argument(
        "--memory-limit", type=memory_size, metavar="SIZE", help="plan so that the peak stays below, e.g. 4GB"
    )
    job.add_argument("--dry-run", action="store_true", help="validate, print the plan, and stop")
    job.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="where layers are run: cpu, cuda or cuda:1 (cpu)"
    )
    job.add_argument("--dtype", choices=CHOICES["dtype"], help="in which layers are run (auto)")
    job.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the source")
    return main


def memory_size(text: str) -> int:
    """Bytes of ``4GB``, ``3500MB`` or ``4GiB``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"must be a size as 4GB, is {text!r}")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (1 + "kmgt".index(unit.lower())))


def list_recipes() -> None:
    """What each recipe is, and whose."""
    from compress.recipe import load_recipe, recipe_names

    for name in recipe_names():
        recipe = load_recipe(name)
        print(f"{recipe.name:<15} {recipe.summary}\n{'':<15} {recipe.paper}")


def run(options: argparse.Namespace, command: str) -> None:
    """Options to a request, and do it."""
    from checkpoint.device import find_device
    from checkpoint.errors import UserError
    from compress.pipeline import make_request
    from compress.pipeline import run as run_request
    from compress.recipe import CHOICES, NUMBERS, load_recipe

    numbers = ("calibration_tokens", "sequence_length", "search_tokens", "seed", *NUMBERS, "factor_bits")
    fields = (*CHOICES, "calibration", "evaluate", *numbers)
    recipe = load_recipe(options.recipe).override({field: getattr(options, field, None) for field in fields})
    if not options.model or not options.target_ratio:
        raise UserError("--model and --target-ratio are needed; see --help")
    run_request(
        make_request(
            options.model,
            options.target_ratio,
            recipe,
            options.output,
            options.work_dir,
            memory_limit=options.memory_limit,
            fresh=options.fresh,
            dry_run=options.dry_run,
            trust_remote_code=options.trust_remote_code,
            command=command,
            device=find_device(options.device),
        )
    )


class Terminated(KeyboardInterrupt):
    """SIGTERM: batch systems send it before they kill."""


def _terminated(*_: object) -> None:
    raise Terminated


def of_process() -> str:
    """Which of several processes speaks, if it is not the main one."""
    from checkpoint import processes

    return "" if processes.is_main() else f" (process {processes.index()})"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    from checkpoint.errors import UserError
    from checkpoint.memory import PROCESS_BYTES, check_allowed, out_of_memory
    from eval.quiet import quiet_libraries

    quiet_libraries()  # before anything imports those libraries
    try:
        check_allowed(PROCESS_BYTES)  # with less some library's own start may fail, or never end
        options = parser().parse_args(given)
        if options.list_recipes:
            list_recipes()
            return 0
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)
    try:
        run(options, shlex.join(["python", "run_pipeline.py", *given]))
    except UserError as problem:
        print(f"error: {problem}{of_process()}", file=sys.stderr)
        return 2
    except OSError as problem:
        if problem.errno not in DISK:
            raise
        trouble, remedy = DISK[problem.errno]
        print(
            f"error: {trouble} ({problem.filename or 'while writing'}); {remedy} and repeat the command",
            file=sys.stderr,
        )
        return 2
    except (MemoryError, RuntimeError) as problem:
        if not out_of_memory(problem):
            raise
        print(
            "error: the system gave no more memory; free some, raise the limit or plan for less with --memory-limit, "
            "and repeat the command: what is finished is kept",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as problem:
        print("interrupted: the same command goes on from the last finished layer", file=sys.stderr)
        return 143 if isinstance(problem, Terminated) else 130
    return 0


def command() -> int:
    """``main`` as a process of its own."""
    start_loading()
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # while it can be told
    except BrokenPipeError:  # as in "| head"
        # what python itself would flush at its end has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(command())
