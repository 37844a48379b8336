"""``python -m eval.compare OUT1 OUT2 ...``: several outputs of one model side by side, quality against size and speed.

Writes ``comparison.html`` (a page that needs nothing else), ``comparison.md`` and ``comparison.png`` into ``--output`` and
prints the table. Exit codes: 0 done, 2 the user's input.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from checkpoint.errors import UserError, told
from checkpoint.files import publish, write_text
from eval.page import listed, page, paragraph, section, table
from eval.report import REPORT
from eval.svg import Point, Series, legend, lines

COMPARISON, PLOT, PAGE = "comparison.md", "comparison.png", "comparison.html"
TONES = ("var(--accent)", "var(--second)", "var(--third)", "var(--muted)")


@dataclass(frozen=True)
class Output:
    """An output directory and its report; ``name`` tells it from the others."""

    name: str
    directory: Path
    report: dict[str, Any]

    @property
    def predicted(self) -> float | None:
        """Predicted KL in nats per token, where the recipe predicts one."""
        return self.report["predicted_loss_nats_per_token"]

    @property
    def recipe(self) -> str:
        """The recipe's name."""
        return self.report["recipe"]["name"]

    @property
    def bytes(self) -> int:
        """Bytes of tensors."""
        return self.report["sizes"]["bytes_after"]

    @cached_property
    def texts(self) -> dict[str, dict[str, Any]]:
        """Per text: KL, excess and perplexity, with tokens and seconds; empty where not evaluated."""
        evaluation = self.report["evaluation"]
        if not evaluation:
            return {}
        measured = evaluation["model"]
        return {
            Path(change["text"]).name: {**alone, **change}
            for alone, change in zip(measured["perplexities"], measured["divergences"], strict=True)
        }

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Accuracy per task, or the task's first metric."""
        return self._tasks("model")

    @property
    def dense_tasks(self) -> dict[str, dict[str, Any]]:
        """The same of the dense model."""
        return self._tasks("dense")

    def _tasks(self, which: str) -> dict[str, dict[str, Any]]:
        evaluation = self.report["evaluation"]
        found = evaluation[which]["tasks"] if evaluation else []
        return {item["task"]: item["metrics"].get("acc") or next(iter(item["metrics"].values())) for item in found}

    @cached_property
    def operations(self) -> float:
        """Multiplications and additions of the decoder's linears a token: 2 for each parameter that is kept and that it meets."""
        with (self.directory / "matrices.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["layer"]]
        return sum(2.0 * int(row["parameters"]) * float(row.get("share") or 1) for row in rows)

    def speed(self, text: str) -> float | None:
        """Tokens a second in the windows of ``text`` when it was evaluated."""
        seconds = self.texts[text]["seconds"] if text in self.texts else 0
        return self.texts[text]["tokens"] / seconds if seconds else None


def read_outputs(directories: Sequence[Path]) -> list[Output]:
    """The outputs, largest first. UserError where one is none, or they were made from different models."""
    outputs = [Output(name, path, _report(path)) for name, path in zip(_names(directories), directories, strict=True)]
    for output in outputs[1:]:
        if output.report["fingerprint"]["weights_sha256"] != outputs[0].report["fingerprint"]["weights_sha256"]:
            raise UserError(
                f"{outputs[0].directory} and {output.directory} were made from different models; compare outputs of one"
            )
    return sorted(outputs, key=lambda output: -output.bytes)


def _report(directory: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads((directory / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"{directory} holds no report of layerpress ({told(problem)}); name outputs of it") from problem
    return report


def _names(directories: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    paths = [path.absolute().parts for path in directories]
    for length in range(1, max(len(path) for path in paths) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def unbeaten(outputs: Sequence[Output], text: str) -> list[Output]:
    """Those that no other beats in both bytes and KL (equal in one counts as beaten by better in the other)."""
    measured = [
        (output, output.bytes, output.texts[text]["kl_nats_per_token"]) for output in outputs if text in output.texts
    ]
    return [
        output
        for output, size, loss in measured
        if not any(a <= size and b <= loss and (a, b) != (size, loss) for _, a, b in measured)
    ]


def write_comparison(directory: Path, directories: Sequence[Path]) -> str:
    """Write the three files into ``directory`` from the outputs' reports; returns the table."""
    outputs = read_outputs(directories)
    directory.mkdir(parents=True, exist_ok=True)
    head, rows = cells(outputs)
    markdown = "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
    picture = any(output.texts or output.predicted is not None for output in outputs)
    if picture:
        plot(outputs, directory / PLOT)
    image = f"\n![loss over the dense model against size]({PLOT})\n" if picture else ""
    model = Path(outputs[0].report["model"]).name
    write_text(directory / COMPARISON, f"# {len(outputs)} compressions of {model}\n\n{markdown}\n{image}")
    write_text(directory / PAGE, page_of(outputs))
    return markdown


def cells(outputs: Sequence[Output]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: size, predicted loss, per text the measured KL and excess; tasks last."""
    texts = list(dict.fromkeys(text for output in outputs for text in output.texts))
    tasks = list(dict.fromkeys(task for output in outputs for task in output.tasks))
    head = ["output", "recipe", "asked", "MB", "decoder kept", "predicted nats"]
    head += [f"{text}: KL, excess" for text in texts] + tasks
    rows = [_dense_row(outputs, texts, tasks)]
    for output in outputs:
        row = [output.name, output.recipe, f"{output.report['target_ratio']:g}", f"{output.bytes / 1e6:.1f}"]
        row.append(f"{output.report['sizes']['decoder_linear_parameters']:.3f}")
        row.append("" if output.predicted is None else f"{output.predicted:.3f}")
        for text in texts:
            item = output.texts.get(text)
            row.append(f"{item['kl_nats_per_token']:.3f}, {item['excess_nats_per_token']:+.3f}" if item else "")
        row += [_accuracy(output.tasks.get(task)) for task in tasks]
        rows.append(row)
    return head, rows


def _dense_row(outputs: Sequence[Output], texts: Sequence[str], tasks: Sequence[str]) -> list[str]:
    accuracies = {name: metric for output in reversed(outputs) for name, metric in output.dense_tasks.items()}
    row = ["dense", "", "1", f"{outputs[0].report['sizes']['bytes_before'] / 1e6:.1f}", "1.000", ""]
    return [*row, *("0, 0" for _ in texts), *(_accuracy(accuracies.get(task)) for task in tasks)]


def _accuracy(metric: dict[str, Any] | None) -> str:
    return f"{metric['value']:.3f} ± {metric['standard_error'] or 0:.3f}" if metric else ""


def page_of(outputs: Sequence[Output]) -> str:
    """The page: the table, and quality against bytes, operations and speed on the first text that all measured ones share."""
    model = Path(outputs[0].report["model"]).name
    measured = [output for output in outputs if output.texts]
    shared = [
        text for text in (measured[0].texts if measured else ()) if all(text in output.texts for output in measured)
    ]
    head, rows = cells(outputs)
    body = [f"<h1>{escape(f'{len(outputs)} compressions of {model}')}</h1>"]
    unmeasured = [output.name for output in outputs if output not in measured]
    notes = [f"not evaluated, so in the table alone: {', '.join(unmeasured)}"] if unmeasured else []
    if measured and not shared:
        notes.append("no text was measured for all of them: evaluate them alike to compare them")
    if len(
        {(text, output.texts[text]["windows"], output.texts[text]["window"]) for output in measured for text in shared}
    ) > len(shared):
        notes.append("not all were measured on the same windows of the same length: their figures cannot be compared")
    if notes:
        body.append(f'<div class="warnings"><strong>Before you read on</strong>{listed(notes)}</div>')
    body.append(section("Figures", table(head, rows)))
    if shared:
        best = unbeaten(measured, shared[0])
        front = Series(
            "not beaten in both size and loss",
            [_point(output, output.bytes / 1e6, shared[0]) for output in best],
            "var(--ink)",
            marks=False,
            dashed=True,
        )
        whole = Point(outputs[0].report["sizes"]["bytes_before"] / 1e6, 0.0, "dense")
        dense = Series("dense", [whole], "var(--ink)")
        body.append(
            _plotted("Bytes", measured, shared[0], "megabytes", lambda output: output.bytes / 1e6, [front, dense])
        )
        body.append(
            _plotted(
                "Arithmetic",
                measured,
                shared[0],
                "million operations a token in the decoder's linears",
                lambda o: o.operations / 1e6,
            )
        )
        if all(output.speed(shared[0]) for output in measured):
            told_of = "As measured during evaluation, so on whatever else the machine was doing; forward passes of whole windows."
            speeds = _plotted(
                "Speed", measured, shared[0], "tokens a second", lambda output: output.speed(shared[0]) or 0.0
            )
            body.append(speeds.replace("</h2>", f"</h2>{paragraph(told_of, 'muted')}"))
    return page(f"{len(outputs)} compressions of {model}", "\n".join(body))


def _point(output: Output, across: float, text: str) -> Point:
    loss = output.texts[text]["kl_nats_per_token"]
    return Point(across, loss, f"{output.name} ({output.recipe}): {across:,.4g}, KL {loss:.4f} nats")


def _plotted(
    title: str, outputs: Sequence[Output], text: str, label: str, across: Any, more: Sequence[Series] = ()
) -> str:
    """KL on ``text`` against ``across(output)``, a line a recipe."""
    recipes = list(dict.fromkeys(output.recipe for output in outputs))
    series = [
        Series(
            recipe,
            sorted(
                (_point(output, across(output), text) for output in outputs if output.recipe == recipe),
                key=lambda p: p.x,
            ),
            TONES[index % len(TONES)],
        )
        for index, recipe in enumerate(recipes)
    ]
    drawn = lines([*more, *series], label, f"KL, {text}, nats a token")
    return section(title, legend([*series, *more]), drawn)


def plot(outputs: Sequence[Output], path: Path) -> None:
    """Predicted and measured loss against the bytes kept, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for recipe in dict.fromkeys(output.recipe for output in outputs):
        own = [(output, output.report["sizes"]["model_bytes"]) for output in outputs if output.recipe == recipe]
        for text in dict.fromkeys(text for output, _ in own for text in output.texts):
            points = [(size, output.texts[text]) for output, size in own if text in output.texts]
            sizes = [size for size, _ in points]
            (line,) = axes.plot(
                sizes, [item["kl_nats_per_token"] for _, item in points], "o-", label=f"{recipe}: KL, {text}"
            )
            excess = [item["excess_nats_per_token"] for _, item in points]
            axes.plot(sizes, excess, "x:", color=line.get_color(), label=f"{recipe}: excess loss, {text}")
        predicted = [(size, output.predicted) for output, size in own if output.predicted is not None]
        if predicted:
            axes.plot(*zip(*predicted, strict=True), "k--", label=f"{recipe}: predicted KL, calibration text")
    axes.set_xlabel("bytes of the model kept")
    axes.set_ylabel("nats per token over the dense model")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=150, format="png")
    publish(temporary, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("outputs", nargs="+", type=Path, metavar="OUT", help="directories that run_pipeline.py wrote")
    parser.add_argument(
        "--output", type=Path, default=Path("comparison"), metavar="DIR", help="where to write (./comparison)"
    )
    options = parser.parse_args(arguments)
    try:
        print(write_comparison(options.output, options.outputs))
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    print(f"written: {options.output / PAGE}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
