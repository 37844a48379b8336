"""The table of an evaluation, as people see it."""

from eval.paired import paired
from eval.results import DivergenceResult, Evaluation, Metric, PerplexityResult, TaskResult


def format_table(dense: Evaluation | None, compressed: Evaluation) -> str:
    """Perplexities and task metrics, beside the dense model's where there is one.

    The last column is the excess loss in nats per token for a text; for a task, the difference and the
    standard error of the paired differences, document by document, and how many answers turned right and wrong.
    """
    if dense is None:
        rows = [["", "model"]]
        rows += [[_text_label(result), _perplexity(result)] for result in compressed.perplexities]
        for task in compressed.tasks:
            rows += [[_task_label(task, name), _metric(value)] for name, value in task.metrics.items()]
    else:
        rows = [["", "dense", "compressed", "change"]]
        for before, after, change in zip(
            dense.perplexities, compressed.perplexities, compressed.divergences, strict=True
        ):
            rows.append([_text_label(after), _perplexity(before), _perplexity(after), _divergence(change)])
        for old, new in zip(dense.tasks, compressed.tasks, strict=True):
            for name in new.metrics:
                values = [_metric(task.metrics[name]) for task in (old, new)]
                rows.append([_task_label(new, name), *values, _difference(old, new, name)])
    return "\n".join([_aligned(rows), *_notes(compressed)])


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def _text_label(result: PerplexityResult) -> str:
    return f"perplexity {result.text}"


def _perplexity(result: PerplexityResult) -> str:
    return f"{result.perplexity:.2f}" if result.perplexity < 1e5 else f"{result.perplexity:.2e}"


def _divergence(result: DivergenceResult) -> str:
    return f"excess {result.excess_nats_per_token:+.4f} nats, KL {result.kl_nats_per_token:.4f}"


def _task_label(result: TaskResult, metric: str) -> str:
    return f"{result.task} {metric}"


def _metric(metric: Metric) -> str:
    return f"{metric.value:.3f}" + ("" if metric.standard_error is None else f" ± {metric.standard_error:.3f}")


def _difference(old: TaskResult, new: TaskResult, metric: str) -> str:
    found = paired(old, new, metric)
    if found is None:
        return f"{new.metrics[metric].value - old.metrics[metric].value:+.3f}"
    flips = "" if found.gained is None else f", {found.gained} right now, {found.lost} wrong now"
    return f"{found.difference:+.3f} ± {found.standard_error:.3f} (paired{flips})"


def _notes(evaluation: Evaluation) -> list[str]:
    """How it was measured: a line a text, a line a task."""
    notes = [
        f"{result.text}: {result.windows} windows of {result.window}, stride {result.stride}, "
        f"{result.tokens} tokens predicted, no beginning-of-sequence token"
        for result in evaluation.perplexities
    ]
    notes += [
        f"{result.task}: {result.documents} documents, {result.few_shot}-shot"
        + (", offline copy" if result.offline_copy else "")
        for result in evaluation.tasks
    ]
    notes += [f"not measured: {item.text}: {item.reason}" for item in evaluation.missing]
    return [*notes, f"in {evaluation.dtype}: {evaluation.dtype_reason}"]
