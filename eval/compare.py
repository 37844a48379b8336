"""Several outputs of one run side by side: a table, and a plot of quality against size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoint.files import publish, write_text
from eval.report import REPORT

COMPARISON = "comparison.md"
PLOT = "comparison.png"


def write_comparison(directory: Path, outputs: list[Path]) -> str:
    """Write ``comparison.md`` and ``comparison.png`` into ``directory`` from the outputs' reports; returns the table."""
    reports = [json.loads((output / REPORT).read_text(encoding="utf-8")) for output in outputs]
    reports.sort(key=lambda report: -report["target_ratio"])
    table = comparison_table(reports)
    picture = any(report["evaluation"] for report in reports) or any(
        _predicted(report) is not None for report in reports
    )
    if picture:
        plot(reports, directory / PLOT)
    image = f"\n![loss over the dense model against size]({PLOT})\n" if picture else ""
    write_text(
        directory / COMPARISON, f"# {len(reports)} sizes of {Path(reports[0]['model']).name}\n\n{table}\n{image}"
    )
    return table


def _predicted(report: dict[str, Any]) -> float | None:
    return report["predicted_loss_nats_per_token"]


def _measured(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per text: KL and excess loss in nats per token; empty where not evaluated."""
    evaluation = report["evaluation"]
    return {Path(item["text"]).name: item for item in evaluation["model"]["divergences"]} if evaluation else {}


def comparison_table(reports: list[dict[str, Any]]) -> str:
    """A Markdown table: size, predicted loss, and per text the measured KL and excess; tasks last."""
    texts = list(_measured(reports[0]))
    tasks = [item["task"] for item in reports[0]["evaluation"]["model"]["tasks"]] if reports[0]["evaluation"] else []
    head = [
        "asked",
        "MB",
        "decoder kept",
        "predicted nats",
        *(f"{text}: KL, excess" for text in texts),
        *(f"{task} acc" for task in tasks),
    ]
    rows = [head, ["---"] * len(head)]
    for report in reports:
        sizes, predicted = report["sizes"], _predicted(report)
        cells = [
            f"{report['target_ratio']:g}",
            f"{sizes['bytes_after'] / 1e6:.1f}",
            f"{sizes['decoder_linear_parameters']:.3f}",
        ]
        cells.append("" if predicted is None else f"{predicted:.3f}")
        measured = _measured(report)
        cells += [
            f"{measured[t]['kl_nats_per_token']:.3f}, {measured[t]['excess_nats_per_token']:+.3f}"
            for t in texts
            if t in measured
        ]
        for item in report["evaluation"]["model"]["tasks"] if report["evaluation"] else []:
            metric = item["metrics"]["acc"]
            cells.append(f"{metric['value']:.3f} ± {metric['standard_error'] or 0:.3f}")
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(reports: list[dict[str, Any]], path: Path) -> None:
    """Predicted and measured loss against the bytes kept, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for text in _measured(reports[0]):
        points = [
            (report["sizes"]["model_bytes"], _measured(report)[text]) for report in reports if text in _measured(report)
        ]
        (line,) = axes.plot(
            [size for size, _ in points], [item["kl_nats_per_token"] for _, item in points], "o-", label=f"KL, {text}"
        )
        excess = [item["excess_nats_per_token"] for _, item in points]
        axes.plot([size for size, _ in points], excess, "x:", color=line.get_color(), label=f"excess loss, {text}")
    known = ((report["sizes"]["model_bytes"], _predicted(report)) for report in reports)
    predicted = [(size, loss) for size, loss in known if loss is not None]
    if predicted:
        axes.plot(
            [size for size, _ in predicted],
            [loss for _, loss in predicted],
            "k--",
            label="predicted KL, calibration text",
        )
    axes.set_xlabel("bytes of the model kept")
    axes.set_ylabel("nats per token over the dense model")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=150, format="png")
    publish(temporary, path)
