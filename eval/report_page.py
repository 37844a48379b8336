"""``report.html``: everything a run left, on one page that needs nothing else. Warnings first."""

from __future__ import annotations

import csv
import json
from html import escape
from pathlib import Path
from typing import Any

from eval.page import bar, listed, page, paragraph, section, table, tiles
from eval.svg import Point, Series, heat_map, legend, lines, shade

PAGE = "report.html"
CURVES = "curves.json"
ASKED_FOR = ("moments damped",)  # counted among what was mended, but the recipe says so


def page_of(directory: Path) -> str:
    """The page of the output in ``directory``, from its report, matrices and curves."""
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    with (directory / "matrices.csv").open(encoding="utf-8", newline="") as file:
        matrices = list(csv.DictReader(file))
    curves = json.loads((directory / CURVES).read_text(encoding="utf-8")) if (directory / CURVES).exists() else []
    sizes, recipe = report["sizes"], report["recipe"]
    title = f"{Path(report['model']).name} at {sizes['model_bytes']:.3f} of its bytes"
    body = "".join(
        [
            f"<h1>{escape(title)}</h1>",
            paragraph(f"Recipe {recipe['name']}: {recipe['summary']} ({recipe['paper']})", "muted"),
            _warnings(report),
            _sizes(report),
            section("Quality", *_quality(report)),
            section("What became of every matrix", *_matrices(matrices), *_mended(report)),
            section("Loss against size, matrix by matrix", *_curves(curves)),
            section("Where the error grows", *_growth(report)),
            section("Time and memory", *_stages(report)),
            section("To make it again", *_again(report)),
        ]
    )
    return page(title, body)


def warnings(report: dict[str, Any]) -> list[str]:
    """What a reader must know before the figures."""
    found, run, evaluation = list[str](), report["run"], report["evaluation"]
    left = report["left_dense"]
    if left:
        found.append(
            f"{len(left)} parameters were left dense: {left[0]['name']} ({left[0]['reason']})"
            + ", ..." * (len(left) > 1)
        )
    if "peft" in report.get("needs", []):
        found.append("without the package peft it loads without its corrections, and transformers says nothing")
    if report["unused_source_tensors"]:
        found.append(
            f"{len(report['unused_source_tensors'])} tensors of the source belong to no parameter and were left out"
        )
    found += [f"mended: {number:,} {what}" for what, number in report["mended"].items() if what not in ASKED_FOR]
    over = [item["stage"] for item in report["stages"] if item["peak_bytes"] > item["planned_bytes"]]
    if run["peak_memory_bytes"] > run["planned_memory_bytes"]:
        found.append(
            f"peak memory {run['peak_memory_bytes'] / 1e6:.0f} MB was above the plan's {run['planned_memory_bytes'] / 1e6:.0f} MB"
        )
    elif over:
        found.append(f"above its own plan of memory, though not above the run's: {', '.join(over)}")
    if evaluation is None:
        return [*found, "not evaluated: nothing here says how good the result is"]
    found += [f"not measured: {item['text']}: {item['reason']}" for item in evaluation["model"]["missing"]]
    for item in evaluation["paired"]:
        if item["p_value"] is not None and item["p_value"] < 0.05:
            found.append(
                f"{item['task']} {item['metric']} changed by {item['difference']:+.3f}, more than chance would have it "
                f"(p = {item['p_value']:.2g}, {item['documents']} documents)"
            )
    few = [task["task"] for task in evaluation["model"]["tasks"] if task["documents"] < 200]
    if few:
        found.append(f"few documents, so wide errors: {', '.join(few)}")
    return found


def _warnings(report: dict[str, Any]) -> str:
    found = warnings(report)
    return f'<div class="warnings"><strong>Before you read on</strong>{listed(found)}</div>' if found else ""


def _sizes(report: dict[str, Any]) -> str:
    sizes = report["sizes"]
    return tiles(
        [
            (f"asked of the {report['recipe']['ratio_scope']}", f"{report['target_ratio']:g}"),
            ("of the bytes kept", f"{sizes['model_bytes']:.4f}"),
            ("megabytes now", f"{sizes['bytes_after'] / 1e6:,.1f}"),
            ("megabytes before", f"{sizes['bytes_before'] / 1e6:,.1f}"),
            ("of all parameters kept", f"{sizes['model_parameters']:.4f}"),
            ("of the decoder linears' parameters kept", f"{sizes['decoder_linear_parameters']:.4f}"),
            ("bits per original decoder weight", f"{sizes['bits_per_decoder_weight']:.2f}"),
        ]
    )


def _quality(report: dict[str, Any]) -> list[str]:
    predicted, evaluation = report["predicted_loss_nats_per_token"], report["evaluation"]
    told = (
        ""
        if predicted is None
        else paragraph(
            f"Predicted before writing: KL(dense || compressed) {predicted:.4f} nats per token on the calibration text."
        )
    )
    if evaluation is None:
        return [told]
    after, before = evaluation["model"], evaluation["dense"]
    texts = [
        [
            Path(new["text"]).name,
            f"{old['perplexity']:.2f}",
            f"{new['perplexity']:.2f}",
            f"{change['excess_nats_per_token']:+.4f}",
            f"{change['kl_nats_per_token']:.4f}",
            f"{new['windows']} × {new['window']}",
        ]
        for old, new, change in zip(before["perplexities"], after["perplexities"], after["divergences"], strict=True)
    ]
    paired = {(item["task"], item["metric"]): item for item in evaluation["paired"]}
    tasks = [
        [
            f"{new['task']} {name}",
            _metric(old["metrics"][name]),
            _metric(metric),
            *_change(paired.get((new["task"], name))),
            str(new["documents"]),
        ]
        for old, new in zip(before["tasks"], after["tasks"], strict=True)
        for name, metric in new["metrics"].items()
    ]
    bars = [(f"KL, {Path(item['text']).name}", item["kl_nats_per_token"]) for item in after["divergences"]]
    bars = [("predicted, calibration text", predicted), *bars] if predicted is not None else bars
    largest = max((value for _, value in bars), default=0) or 1
    return [
        table(
            ["text", "dense perplexity", "compressed", "excess nats", "KL nats", "windows"],
            texts,
            "perplexity and nats per token",
        )
        if texts
        else "",
        table(
            ["task", "dense", "compressed", "paired difference", "right now", "wrong now", "p", "documents"],
            tasks,
            "± is a standard error; the difference is document by document; p is McNemar's exact test",
        )
        if tasks
        else "",
        told,
        table(
            ["loss over the dense model", "nats per token", ""],
            [[name, f"{value:.4f}", bar(value / largest)] for name, value in bars],
            "predicted and measured",
        )
        if bars
        else "",
    ]


def _metric(metric: dict[str, Any]) -> str:
    error = metric["standard_error"]
    return f"{metric['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _change(item: dict[str, Any] | None) -> list[str]:
    if item is None:
        return ["", "", "", ""]
    flips = (
        ["", "", ""] if item["gained"] is None else [str(item["gained"]), str(item["lost"]), f"{item['p_value']:.2g}"]
    )
    return [f"{item['difference']:+.3f} ± {item['standard_error']:.3f}", *flips]


def _matrices(matrices: list[dict[str, str]]) -> list[str]:
    layers = list(dict.fromkeys(row["layer"] for row in matrices if row["layer"]))
    bits = {id(row): 8 * float(row["bytes"]) / (int(row["d_out"]) * int(row["d_in"])) for row in matrices}
    widest = max(bits.values())
    in_layers = [row for row in matrices if row["layer"]]
    cells = {
        (row["matrix"], row["layer"]): (bits[id(row)] / widest, _described(row, bits[id(row)])) for row in in_layers
    }
    rows = list(dict.fromkeys(row["matrix"] for row in in_layers))
    scale = "".join(
        f'<li><i style="background:{shade(part)}"></i>{part * widest:.1f}</li>' for part in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    ends = [_described(row, bits[id(row)]) for row in matrices if not row["layer"]]
    return [
        paragraph(
            "Bits per original weight, by layer (left to right); hold the pointer over a cell for its form, rank and bits."
        ),
        heat_map(rows, layers, cells),
        f'<ul class="legend">{scale}</ul>',
        listed(ends),
        table(["kind", "matrices", "of the bytes"], _kinds(matrices)),
    ]


def _described(row: dict[str, str], bits: float) -> str:
    place = f"layer {row['layer']}, {row['matrix']}" if row["layer"] else row["matrix"]
    more = [f"rank {row['rank']}"] if row["rank"] not in ("", "0") else []
    more += [f"{row['bits']} bits in groups of {row['group_size']}"] if row["bits"] else []
    more += [f"factors in {row['factor_bits']} bits"] if row["factor_bits"] else []
    error = f"; relative error {row['relative_error']}" if row["relative_error"] else ""
    return f"{place}: {', '.join([row['form'], *more])}; {bits:.2f} bits per weight{error}"


def _mended(report: dict[str, Any]) -> list[str]:
    rows = [[what, f"{number:,}"] for what, number in report["mended"].items()]
    return [table(["mended so that numbers stay finite", "times"], rows)] if rows else []


def _kinds(matrices: list[dict[str, str]]) -> list[list[str]]:
    whole = sum(int(row["bytes"]) for row in matrices) or 1
    names = [f"{row['form']}, {row['bits']} bits" if row["bits"] else row["form"] for row in matrices]
    return [
        [
            name,
            str(names.count(name)),
            f"{sum(int(row['bytes']) for row, of in zip(matrices, names, strict=True) if of == name) / whole:.3f}",
        ]
        for name in sorted(set(names))
    ]


def _curves(curves: list[dict[str, Any]]) -> list[str]:
    """One panel a role; a line a layer, dark to light with depth; a dot where it was cut."""
    panels, depth = [], max((item["layer"] for item in curves), default=0) or 1
    for role in dict.fromkeys(item["role"] for item in curves):
        series = []
        for item in curves:
            if item["role"] == role:
                tone = f"color-mix(in srgb, var(--accent) {100 - round(90 * max(item['layer'], 0) / depth)}%, var(--second))"
                points = [
                    Point(kept, loss, f"{item['name']}: {kept:.3f} of its bytes, loss {loss:.3g}")
                    for kept, loss in item["points"]
                ]
                series.append(Series(item["name"], points, tone, marks=False))
                if item["chosen"]:
                    series.append(
                        Series(item["name"], [Point(item["chosen"][0], item["chosen"][1], item["name"])], tone)
                    )
        panels.append(
            f"<h3>{escape(role)}</h3>"
            + lines(series, "part of its bytes kept", "loss left", log=True, width=380, height=250)
        )
    if not panels:
        return []
    told = (
        "Loss left (of what dropping the matrix would lose, by the method's own measure) against bytes kept; early layers in one "
        "colour, late in the other; a dot where the matrix was cut. Dense matrices have none."
    )
    return [paragraph(told), f'<div class="panels">{"".join(f"<div>{panel}</div>" for panel in panels)}</div>']


def _growth(report: dict[str, Any]) -> list[str]:
    evaluation = report["evaluation"]
    found = [item for item in evaluation["model"]["divergences"] if item["error_after_layer"]] if evaluation else []
    tones = ("var(--accent)", "var(--second)", "var(--third)", "var(--muted)")
    series = [
        Series(
            Path(item["text"]).name,
            [
                Point(layer, error, f"after layer {layer}: {error:.4f}")
                for layer, error in enumerate(item["error_after_layer"])
            ],
            tones[index % len(tones)],
        )
        for index, item in enumerate(found)
    ]
    if not series:
        return []
    told = (
        "Distance of the hidden states from the dense model's over their size, after each decoder layer, one window of each text "
        "(the last after the final norm)."
    )
    return [paragraph(told), lines(series, "layer", "relative error", whole=True), legend(series)]


def _stages(report: dict[str, Any]) -> list[str]:
    run, stages = report["run"], report["stages"]
    longest = max(item["seconds"] for item in stages) or 1
    rows = [
        [
            item["stage"],
            f"{item['seconds']:.1f}",
            bar(item["seconds"] / longest),
            f"{item['peak_bytes'] / 1e6:.0f}",
            f"{item['planned_bytes'] / 1e6:.0f}",
        ]
        for item in stages
    ]
    rows.append(
        [
            "all",
            f"{run['seconds']:.1f}",
            "",
            f"{run['peak_memory_bytes'] / 1e6:.0f}",
            f"{run['planned_memory_bytes'] / 1e6:.0f}",
        ]
    )
    many = f" in each of {run['processes']} processes" if run["processes"] > 1 else ""
    return [
        table(["stage", "seconds", "", "peak memory, MB", "planned, MB"], rows),
        paragraph(
            f"{run['threads']} thread{'s' * (run['threads'] > 1)}{many}, before evaluation. "
            f"The load check had {run['check_peak_memory_bytes'] / 1e6:.0f} MB in a process of its own."
        ),
    ]


def _again(report: dict[str, Any]) -> list[str]:
    run, calibration, recipe = report["run"], report["calibration"], report["recipe"]
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    facts = [
        versions,
        f"computed in {report['compute_dtype']['dtype'].removeprefix('torch.')}: {report['compute_dtype']['reason']}",
    ]
    if calibration:
        texts = ", ".join(Path(item["text"]).name for item in calibration["texts"])
        facts.append(
            f"calibration: {calibration['tokens']:,} tokens of {texts} in windows of "
            f"{calibration['sequence_length']}, seed {calibration['seed']}; "
            f"sha256 of the token ids {calibration['token_ids_sha256']}"
        )
    facts += [f"sha256 of the weights {report['fingerprint']['weights_sha256']}"]
    if report["evaluation"]:
        evaluated = report["evaluation"]["model"]
        facts.append(
            f"evaluated in {evaluated['dtype']} ({evaluated['dtype_reason']}), "
            + ", ".join(f"{k} {v}" for k, v in evaluated["versions"].items())
        )
    fields = [[name, str(value)] for name, value in recipe.items() if name not in ("summary", "paper")]
    return [
        f"<pre>{escape(run['command'])}</pre>",
        listed(facts),
        f"<details><summary>The whole recipe</summary>{table(['field', 'value'], fields)}</details>",
    ]
