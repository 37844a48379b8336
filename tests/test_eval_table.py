"""The numbers that the table adds to those it is given."""

import pytest

from eval.paired import Paired, paired
from eval.results import Metric, TaskResult


def task(values: list[float]) -> TaskResult:
    metrics = {"acc": Metric(sum(values) / len(values), None)}
    return TaskResult("t", len(values), 0, True, metrics, {"acc": values}, 0.0)


def test_paired_difference_is_document_by_document() -> None:
    found = paired(task([1, 1, 0, 0]), task([1, 0, 0, 0]), "acc")
    assert found == Paired("t", "acc", 4, -0.25, pytest.approx(0.25), 0, 1, 1.0)


def test_flips_are_counted_both_ways_and_weighed_against_chance() -> None:
    before, after = [1.0] * 10 + [0.0] * 10, [0.0] * 9 + [1.0] * 2 + [0.0] * 9
    found = paired(task(before), task(after), "acc")
    assert found is not None and (found.gained, found.lost) == (1, 9)
    # of ten fair coins, the chance of at most one head or at most one tail: 2 (1 + 10) / 2^10
    assert found.p_value == pytest.approx(22 / 1024)


def test_a_metric_that_is_not_right_or_wrong_has_no_flips() -> None:
    found = paired(task([0.5, 0.25]), task([0.5, 0.5]), "acc")
    assert found is not None and (found.difference, found.gained, found.p_value) == (0.125, None, None)
    assert paired(task([1.0]), task([0.0]), "acc") is None
