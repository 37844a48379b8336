"""The numbers that the table adds to those it is given."""

import pytest

from eval.harness import _task_result
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


def test_a_task_with_several_filters_keeps_the_documents_of_each_apart() -> None:
    """As gsm8k has it: every document once a filter, under the names of the metrics."""
    values = {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.5, "exact_match,flexible": 1.0}
    found = {"results": {"gsm": values}, "n-samples": {"gsm": {"effective": 2}}, "n-shot": {"gsm": 5}}
    right = {"strict": [1.0, 0.0], "flexible": [1.0, 1.0]}
    samples = [
        {"doc_id": number, "filter": name, "metrics": ["exact_match"], "exact_match": right[name][number]}
        for name in right
        for number in (1, 0)
    ]
    result = _task_result(found, samples, "gsm", False, 1.0)
    assert result.per_document == {"exact_match,strict": [1.0, 0.0], "exact_match,flexible": [1.0, 1.0]}
    assert set(result.per_document) == set(result.metrics) and result.documents == 2
