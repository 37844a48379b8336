"""``python -m eval --model DIR [--compare-with DENSE_DIR]``: measure a checkpoint, print a table, write JSON.

The exact command behind a compression's report:

    python -m eval --model OUT --compare-with DENSE --evaluate quick --trust-remote-code \\
        --output OUT/evaluation.json

Exit codes: 0 done, 2 the user's input (one line ``error: ...`` on stderr), 130 interrupted.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from checkpoint import processes
from checkpoint.errors import UserError
from checkpoint.files import write_json
from eval.quiet import quiet_libraries
from eval.results import QUICK, EvaluationSettings
from eval.table import format_table


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the checkpoint to measure")
    parser.add_argument(
        "--compare-with",
        type=Path,
        metavar="DIR",
        help="the dense model: measured too, with KL(dense || model); its own code is never trusted",
    )
    parser.add_argument(
        "--evaluate",
        default="quick",
        metavar="quick|TASK,TASK",
        help="quick (arc_easy and piqa, 50 documents each), or lm-eval tasks, all documents unless --limit",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=list(QUICK.texts),
        metavar="NAME|FILE",
        help="texts for perplexity: boolq-validation, sciq-validation (both by default), or UTF-8 files",
    )
    parser.add_argument("--windows", type=_positive, default=QUICK.max_windows, metavar="N", help="windows a text (16)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="documents a task")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the figures as JSON")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model code that --model brings")
    parser.add_argument("--verbose", action="store_true", help="show the libraries' own logs and progress bars")
    return parser.parse_args(arguments)


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return number


def settings_of(options: argparse.Namespace) -> EvaluationSettings:
    """What the command line asks to measure."""
    settings = replace(QUICK, texts=tuple(options.text), max_windows=options.windows)
    if options.evaluate != "quick":
        tasks = tuple(filter(None, options.evaluate.split(",")))
        settings = replace(settings, tasks=tasks, limit=None)
    return settings if options.limit is None else replace(settings, limit=options.limit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    options = parse(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("eval").setLevel(logging.INFO)
    if not options.verbose:
        quiet_libraries()
    # Imported here: the libraries read their switches when they load.
    from eval.run import compare, evaluate

    settings = settings_of(options)
    try:
        processes.join()
        if not processes.is_main():
            logging.getLogger("eval").setLevel(logging.WARNING)
        if options.compare_with is None:
            dense, model = None, evaluate(options.model, settings, options.trust_remote_code)
        else:
            dense, model = compare(options.model, options.compare_with, settings, options.trust_remote_code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # every figure measured so far is cached
    main_process = processes.is_main()
    processes.leave()
    if not main_process:
        return 0
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "settings": asdict(settings),
            "model": model.to_json(),
            "dense": None if dense is None else dense.to_json(),
        }
        write_json(options.output, report)
    print(format_table(dense, model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
