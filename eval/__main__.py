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

from checkpoint.errors import UserError
from checkpoint.files import write_json
from eval.paired import all_paired
from eval.presets import PRESETS, QUICK, settings_for
from eval.quiet import quiet_libraries
from eval.results import EvaluationSettings
from eval.table import format_table
from eval.texts import HUB_TEXTS, NAMED_TEXTS


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
        metavar="PRESET|TASK,TASK",
        help="; ".join(f"{name}: {about}" for name, (about, _) in PRESETS.items()) + "; or lm-eval tasks and groups",
    )
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="NAME|FILE",
        help=f"texts for perplexity: {', '.join((*NAMED_TEXTS, *HUB_TEXTS))}, or UTF-8 files (as the preset says)",
    )
    parser.add_argument("--windows", type=_positive, metavar="N", help=f"windows a text ({QUICK.max_windows} of 1024)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="documents a task")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the figures as JSON")
    parser.add_argument(
        "--lm-eval-output",
        type=Path,
        metavar="DIR",
        help="where to write the tasks' results in lm-eval's own schema too",
    )
    parser.add_argument(
        "--chat-template", action="store_true", help="put the model's chat template around every document"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="see that the model, the texts and the tasks' documents are there, and stop",
    )
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
    settings = settings_for(options.evaluate)
    changes = {
        "texts": None if options.text is None else tuple(options.text),
        "where_available": None if options.text is None else False,
        "max_windows": options.windows,
        "limit": options.limit,
        "chat_template": options.chat_template or None,
    }
    return replace(settings, **{field: value for field, value in changes.items() if value is not None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    options = parse(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("eval").setLevel(logging.INFO)
    if not options.verbose:
        quiet_libraries()
    # Imported here: the libraries read their switches when they load.
    from checkpoint import processes
    from eval.lm_eval_file import write_lm_eval
    from eval.run import check, compare, evaluate

    try:
        settings = settings_of(options)
        processes.join()
        if not processes.is_main():
            logging.getLogger("eval").setLevel(logging.WARNING)
        if options.dry_run:
            check(options.model, settings, options.trust_remote_code)
            processes.leave()
            return 0
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
            "paired": [] if dense is None else [asdict(item) for item in all_paired(dense, model)],
        }
        write_json(options.output, report)
    for found, trust in ((dense, False), (model, options.trust_remote_code)) if options.lm_eval_output else ():
        if found is not None and found.lm_eval:
            write_lm_eval(options.lm_eval_output, Path(found.model), found.lm_eval, trust)
    print(format_table(dense, model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
