"""loss-aware against svd-llm with uniform ranks: one run, the same tokens, texts and tasks; prints two tables.

    python benchmarks/loss_aware.py --calibration train.txt --text test.txt

By default: SmolLM2-135M-Instruct (offline package), decoder scope, 128 windows of 512 tokens, seed 0; perplexity in 24
windows of 1024 of TEXT and of the BoolQ validation passages; with --tasks also the seven zero-shot tasks, 200 documents
each, at 0.8. Outputs stay in benchmarks/results/loss-aware and figures in the cache: a second start goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tables import accuracies, line  # noqa: E402

from eval.task_files import TASKS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "loss-aware"


def main() -> None:
    """Compress, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="offline")
    parser.add_argument("--calibration", default="offline")
    parser.add_argument("--text", default="sciq-validation", help="the first test text; BoolQ validation is the second")
    parser.add_argument("--ratios", nargs="+", default=["0.8", "0.6"])
    parser.add_argument("--recipes", nargs="+", default=["svd-llm", "loss-aware"], help="the first is the baseline")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--tasks", action="store_true")
    options = parser.parse_args()

    from compress.pipeline import offline_model
    from eval.quiet import quiet_libraries
    from eval.results import EvaluationSettings
    from eval.run import compare

    quiet_libraries()
    model = offline_model() if options.model == "offline" else Path(options.model)
    reports: dict[tuple[str, str], dict] = {}
    for recipe in options.recipes:
        output = RESULTS / Path(recipe).stem
        command = [sys.executable, str(ROOT / "run_pipeline.py"), "--model", str(model), "--recipe", recipe]
        command += ["--target-ratio", *options.ratios, "--ratio-scope", "decoder", "--calibration", options.calibration]
        command += ["--evaluate", "none", "--output", str(output)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for ratio in options.ratios:
            reports[recipe, ratio] = json.loads((output / f"ratio-{float(ratio):.2f}" / "report.json").read_text())

    measured: list[tuple[str, float, float | None, list[float], list[float]]] = []
    texts = EvaluationSettings(texts=(options.text, "boolq-validation"), max_windows=options.windows)
    baseline: dict[str, list[float]] = {}
    for (recipe, ratio), report in reports.items():
        directory = RESULTS / Path(recipe).stem / f"ratio-{float(ratio):.2f}"
        dense, compressed = compare(directory, model, texts, trust_remote_code=True)
        names = [Path(item.text).name for item in dense.perplexities]
        if (recipe, ratio) == next(iter(reports)):
            line(
                [
                    "method",
                    "ratio",
                    "predicted",
                    *(f"{name}: {what}" for name in names for what in ("ppl", "excess", "KL", "x baseline")),
                ]
            )
            line(["---"] * (3 + 4 * len(names)))
            line(
                [
                    "dense",
                    "1",
                    "",
                    *(cell for item in dense.perplexities for cell in (f"{item.perplexity:.2f}", "0", "0", "")),
                ]
            )
        excess = [item.excess_nats_per_token for item in compressed.divergences]
        baseline.setdefault(ratio, excess)
        predicted = report["predicted_loss_nats_per_token"]
        cells = [recipe, f"{report['sizes']['achieved_ratio']:.4f}", "" if predicted is None else f"{predicted:.3f}"]
        for after, change, extra, base in zip(
            compressed.perplexities, compressed.divergences, excess, baseline[ratio], strict=True
        ):
            cells += [
                f"{after.perplexity:.2f}",
                f"{extra:.3f}",
                f"{change.kl_nats_per_token:.3f}",
                f"{extra / base:.3f}",
            ]
        line(cells)
        kl = [item.kl_nats_per_token for item in compressed.divergences]
        measured.append((recipe, report["sizes"]["achieved_ratio"], predicted, excess, kl))
    plot(measured, names)
    print()
    for recipe in options.recipes:
        first, last = (reports[recipe, options.ratios[index]] for index in (0, -1))
        stages = ", ".join(f"{item['stage']} {item['seconds']:.0f} s" for item in first["stages"])
        print(
            f"{recipe}: {stages}; one ratio {first['run']['seconds']:.0f} s, all {len(options.ratios)} "
            f"{last['run']['seconds']:.0f} s; peak {last['run']['peak_memory_bytes'] / 1e6:.0f} MB"
        )
    print(
        f"\n{model.name}, decoder scope, {reports[options.recipes[0], options.ratios[0]]['calibration']['tokens']:,} calibration tokens,"
    )
    print(f"{options.windows} windows of 1024 a text, {compressed.dtype}, seed 0\n", flush=True)

    if options.tasks:
        settings = EvaluationSettings(texts=(), tasks=tuple(TASKS), limit=200)
        for recipe in options.recipes:
            dense, compressed = compare(
                RESULTS / Path(recipe).stem / "ratio-0.80", model, settings, trust_remote_code=True
            )
            if recipe == options.recipes[0]:
                line(["method at 0.8, acc", *TASKS, "mean"])
                line(["---"] * (len(TASKS) + 2))
                line(["dense", *accuracies(dense, 3)])
            line([recipe, *accuracies(compressed, 3)])


def plot(measured: list[tuple[str, float, float | None, list[float], list[float]]], texts: list[str]) -> None:
    """Excess of every recipe, and predicted loss beside measured KL, over the ratios: RESULTS/loss-aware.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for recipe in dict.fromkeys(item[0] for item in measured):
        rows = sorted(item for item in measured if item[0] == recipe)
        for index, text in enumerate(texts):
            style = ("-o", "--s")[index % 2]
            left.plot([row[1] for row in rows], [row[3][index] for row in rows], style, label=f"{recipe}, {text}")
            if all(row[2] is not None for row in rows):
                right.plot([row[1] for row in rows], [row[4][index] for row in rows], style, label=f"KL on {text}")
        if all(row[2] is not None for row in rows):
            right.plot([row[1] for row in rows], [row[2] or 0.0 for row in rows], "k:^", label=f"predicted, {recipe}")
    left.set(title="excess loss, nats per token", xlabel="decoder ratio", yscale="log")
    right.set(title="predicted and measured KL(dense || compressed)", xlabel="decoder ratio", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "loss-aware.png", dpi=110)
    print(f"\nplot: {RESULTS / 'loss-aware.png'}")


if __name__ == "__main__":
    main()
