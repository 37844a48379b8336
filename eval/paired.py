"""Two models on the same documents: the difference, its error, and the answers that flipped."""

import math
from dataclasses import dataclass

from scipy.stats import binomtest

from eval.results import Evaluation, TaskResult


@dataclass(frozen=True)
class Paired:
    """Of one metric of one task, compressed - dense: mean difference over the documents and its standard error.

    Where the metric is right or wrong: how many answers became right (``gained``) and wrong (``lost``), and the probability of a split
    as uneven if either were as likely (McNemar's exact test, Psychometrika 12, 1947). None for other metrics.
    """

    task: str
    metric: str
    documents: int
    difference: float
    standard_error: float
    gained: int | None
    lost: int | None
    p_value: float | None


def paired(dense: TaskResult, compressed: TaskResult, metric: str) -> Paired | None:
    """The comparison of one metric; None where the documents' own values are not kept, or are fewer than two."""
    before, after = dense.per_document.get(metric), compressed.per_document.get(metric)
    if before is None or after is None or len(before) < 2:
        return None
    differences = [new - old for old, new in zip(before, after, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((difference - mean) ** 2 for difference in differences) / (count - 1)
    gained: int | None = None
    lost: int | None = None
    p_value: float | None = None
    if {*before, *after} <= {0.0, 1.0}:
        gained, lost = differences.count(1.0), differences.count(-1.0)
        p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Paired(compressed.task, metric, count, mean, math.sqrt(variance / count), gained, lost, p_value)


def all_paired(dense: Evaluation, compressed: Evaluation) -> list[Paired]:
    """Of every metric of every task that has its documents' values."""
    found = [
        paired(old, new, metric)
        for old, new in zip(dense.tasks, compressed.tasks, strict=True)
        for metric in new.metrics
    ]
    return [item for item in found if item is not None]
