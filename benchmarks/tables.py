"""What the benchmarks share: their flags, rows of Markdown tables, figures of evaluations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def study(description: str | None) -> argparse.Namespace:
    """The flags of a study of one model: ``model`` (the offline one by default), ``calibration`` and ``text``."""
    from compress.pipeline import offline_model
    from eval.quiet import quiet_libraries

    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", default="offline")
    parser.add_argument("--text", default="sciq-validation", help="the first test text; BoolQ validation is the second")
    options = parser.parse_args()
    quiet_libraries()
    options.model = options.model or offline_model()
    return options


def line(cells: Iterable[Any]) -> None:
    """A row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def compression(model: Any, recipe: Any, ratio: str, scope: str, tokens: int, output: Path, *more: str) -> list[str]:
    """The command line of a compression that is not evaluated."""
    found = [sys.executable, str(ROOT / "run_pipeline.py"), "--model", str(model), "--recipe", str(recipe)]
    found += ["--target-ratio", ratio, "--ratio-scope", scope, "--calibration-tokens", str(tokens)]
    return [*found, "--evaluate", "none", "--output", str(output), *more]


def accuracies(evaluation: Any, digits: int) -> list[str]:
    """Accuracy of every task, and their mean to three digits."""
    values = [task.metrics["acc"].value for task in evaluation.tasks]
    return [f"{value:.{digits}f}" for value in values] + [f"{sum(values) / len(values):.3f}"]
