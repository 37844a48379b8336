"""The numbers that the table adds to those it is given."""

import pytest

from eval.results import Metric, TaskResult
from eval.table import paired_difference


def test_paired_difference_is_document_by_document() -> None:
    def task(values: list[float]) -> TaskResult:
        metrics = {"acc": Metric(sum(values) / len(values), None)}
        return TaskResult("t", len(values), 0, True, metrics, {"acc": values}, 0.0)

    difference = paired_difference(task([1, 1, 0, 0]), task([1, 0, 0, 0]), "acc")
    assert difference == Metric(-0.25, pytest.approx(0.25))
