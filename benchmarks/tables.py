"""What the benchmarks print: rows of Markdown tables, accuracies of evaluations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def line(cells: Iterable[Any]) -> None:
    """A row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def accuracies(evaluation: Any, digits: int) -> list[str]:
    """Accuracy of every task, and their mean to three digits."""
    values = [task.metrics["acc"].value for task in evaluation.tasks]
    return [f"{value:.{digits}f}" for value in values] + [f"{sum(values) / len(values):.3f}"]
