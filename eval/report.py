"""What a run leaves beside its checkpoint: report.html, report.json, matrices.csv, curves.json, recipe.yaml and a README model card."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import yaml

from checkpoint.files import write_json, write_text
from eval.report_page import CURVES, PAGE, page_of

REPORT = "report.json"
CARD = "README.md"
LM_EVAL = "lm_eval"  # the folder with what lm-eval itself would have written


def write_report(
    directory: Path,
    *,
    plan: Any,
    fingerprint: dict[str, Any],
    windows: dict[str, Any] | None,
    rows: list[dict[str, Any]],
    curves: list[dict[str, Any]],
    predicted: float | None,
    mended: dict[str, int],
    stages: list[dict[str, Any]],
    run: dict[str, Any],
) -> None:
    """Write the report of a finished compression into ``directory``; the evaluation is added later."""
    report = {
        "fingerprint": fingerprint,
        "model": str(plan.source.directory),
        "model_class": type(plan.source.model).__name__,
        "recipe": plan.recipe.as_dict(),
        "target_ratio": plan.ratio,
        "sizes": plan.sizes.as_dict(),
        "calibration": windows,
        "compute_dtype": {"dtype": fingerprint["compute_dtype"], "reason": plan.dtype_reason},
        "predicted_loss_nats_per_token": predicted,
        "mended": mended,
        "left_dense": [{"name": name, "reason": reason} for name, reason in plan.structure.left_dense],
        "unused_source_tensors": plan.source.unused,
        "needs": needed_packages(directory, plan.recipe.export, rows),
        "stages": stages,
        "seconds_per_matrix": sum(row["seconds"] for row in rows) / len(rows),
        "run": run,
        "evaluation": None,
    }
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(directory / "matrices.csv", table.getvalue())
    write_text(directory / "recipe.yaml", yaml.safe_dump(plan.recipe.as_dict(), sort_keys=False, allow_unicode=True))
    write_json(directory / CURVES, curves)
    write_json(directory / REPORT, report)
    write_text(directory / CARD, card(report, None))
    write_text(directory / PAGE, page_of(directory))


def needed_packages(directory: Path, export: str, rows: list[dict[str, Any]]) -> list[str]:
    """What must be installed beside transformers for the checkpoint in ``directory`` to load whole."""
    adapter = (directory / "adapter_config.json").is_file()
    integers = export != "dense" and any(row["bits"] or row["factor_bits"] for row in rows)
    return ["compressed-tensors"] * integers + ["peft"] * adapter


def add_evaluation(directory: Path, table: str) -> None:
    """Put the figures of ``evaluation.json`` and their table into the report and the card."""
    report = json.loads((directory / REPORT).read_text(encoding="utf-8"))
    report["evaluation"] = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))
    write_json(directory / REPORT, report)
    write_text(directory / CARD, card(report, table))
    write_text(directory / PAGE, page_of(directory))


def card(report: dict[str, Any], table: str | None) -> str:
    """The model card as Markdown."""
    sizes, recipe, run = report["sizes"], report["recipe"], report["run"]
    name = Path(report["model"]).resolve().name
    trust = ", trust_remote_code=True" if recipe["export"] == "factored" else ""
    calibration = report["calibration"]
    texts = ", ".join(Path(item["text"]).name for item in calibration["texts"]) if calibration else ""
    text = (
        f"{calibration['tokens']:,} tokens of `{texts}` in windows of {calibration['sequence_length']}, "
        f"seed {calibration['seed']} ({calibration['policy']})"
        if calibration
        else "no calibration text (data-free)"
    )
    stages = "\n".join(
        f"| {s['stage']} | {s['seconds']:.1f} | {s['peak_bytes'] / 1e6:.0f} | {s['planned_bytes'] / 1e6:.0f} |"
        for s in report["stages"]
    )
    left = "".join(f"- `{item['name']}`: {item['reason']}\n" for item in report["left_dense"])
    evaluation = f"```\n{table.rstrip()}\n```" if table else "Not evaluated."
    needs = report.get("needs", [])  # reports of earlier versions have none
    install = f"\nIt needs `pip install {' '.join(needs)}`." if needs else ""
    if "peft" in needs:
        install += (
            " Without peft transformers loads the integers alone, and says nothing of the corrections that are missing."
        )
    mended = "".join(f"- {number:,} {what}\n" for what, number in report["mended"].items())
    predicted = report["predicted_loss_nats_per_token"]
    prediction = (
        f"""
Predicted before writing: KL(dense || compressed) {predicted:.4f} nats per token on the calibration text (second order, so too
low where the loss is large).
"""
        if predicted is not None
        else ""
    )
    return f"""---
library_name: transformers
tags: [layerpress, compressed]
---
# {name}, compressed to {sizes["model_bytes"]:.3f} of its bytes by layerpress

Recipe `{recipe["name"]}` ({recipe["summary"]}; {recipe["paper"]}), asked for {report["target_ratio"]:g} of the {recipe["ratio_scope"]}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype="auto"{trust})
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY{trust})
```
{install}

## Size

| | kept |
|---|---|
| parameters of the decoder's linears | {sizes["decoder_linear_parameters"]:.4f} |
| parameters of the whole model | {sizes["model_parameters"]:.4f} |
| bytes of the whole model | {sizes["model_bytes"]:.4f} ({sizes["bytes_after"]:,} of {sizes["bytes_before"]:,}) |
| bits per original decoder weight | {sizes["bits_per_decoder_weight"]:.3f} |
| ranks removed (of all ranks; the papers' ERR) | {sizes["effective_rank_reduction"]:.4f} |

`report.html` shows all of this and more: a browser is all it needs.
The rank and error of every matrix are in `matrices.csv`, everything else in `report.json`.
{"Left dense:" + chr(10) + left if left else ""}
## Quality

{evaluation}
{prediction}
## How it was made

Calibrated on {text}.
Computed in {report["compute_dtype"]["dtype"].removeprefix("torch.")} ({report["compute_dtype"]["reason"]}) with {run["threads"]} threads\
{f" in each of {run['processes']} processes" if run["processes"] > 1 else ""}, \
torch {run["versions"]["torch"]}, transformers {run["versions"]["transformers"]}.

    {run["command"]}

| stage | seconds | peak memory, MB | planned, MB |
|---|---|---|---|
{stages}

A matrix took {report["seconds_per_matrix"]:.2f} s to decompose on average.
{"What was mended so that numbers stay finite, over all matrices and candidates:" + chr(10) + chr(10) + mended if mended else ""}
In all {run["seconds"]:.0f} s before evaluation; peak memory {run["peak_memory_bytes"] / 1e6:.0f} MB \
(planned {run["planned_memory_bytes"] / 1e6:.0f} MB).
"""
