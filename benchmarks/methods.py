"""Every recipe at a decoder ratio of 0.8, the main ones at 0.9 and 0.6 too: one table and a plot.

    python benchmarks/methods.py --calibration train.txt --text test.txt

By default: SmolLM2-135M-Instruct (offline package), 128 windows of 512 tokens, seed 0; perplexity in 24 windows of 1024 of TEXT
and of the BoolQ validation passages; the seven zero-shot tasks, 50 documents each. What is finished stays in
benchmarks/results/methods and in the figure cache: a second start goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tables import accuracies, line  # noqa: E402

from eval.task_files import TASKS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "methods"
MAIN = ("loss-aware", "svd-llm", "llm-rom", "lorap", "welore", "asvd")
ORDER = (
    "svd",
    "asvd",
    "fwsvd",
    "welore",
    "lord",
    "svd-llm",
    "svd-llm-update",
    "svd-llm-v2",
    "llm-rom",
    "lorap",
    "lorap-repair",
)
HEADER = ("recipe", "decoder ratio", *("ppl", "excess") * 2, *TASKS, "mean acc", "seconds", "peak MB")


def compress(options: argparse.Namespace, model: Path, recipe: str, ratio: str) -> dict[str, Any]:
    """Run the public command unless its output is there; returns its report."""
    output = RESULTS / f"{recipe}-{ratio}"
    if not (output / "report.json").exists():
        command = [sys.executable, str(ROOT / "run_pipeline.py"), "--model", str(model), "--recipe", recipe]
        command += ["--target-ratio", ratio, "--ratio-scope", "decoder", "--calibration", options.calibration]
        command += ["--evaluate", "none", "--output", str(output), "--work-dir", str(RESULTS / f"{recipe}.work")]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def main() -> None:
    """Compress, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="offline")
    parser.add_argument("--calibration", default="offline")
    parser.add_argument("--text", default="sciq-validation", help="the first test text; BoolQ validation is the second")
    parser.add_argument("--recipes", nargs="+", help="all by default")
    parser.add_argument(
        "--ratios", nargs="+", default=["0.8", "0.9", "0.6"], help="all but the first: the main recipes"
    )
    options = parser.parse_args()

    from compress.pipeline import offline_model
    from compress.recipe import recipe_names
    from eval.quiet import quiet_libraries
    from eval.results import EvaluationSettings
    from eval.run import compare

    quiet_libraries()
    model = offline_model() if options.model == "offline" else Path(options.model)
    known = [name for name in ORDER if name in recipe_names()] + [name for name in recipe_names() if name not in ORDER]
    RESULTS.mkdir(parents=True, exist_ok=True)
    settings = EvaluationSettings(
        texts=(options.text, "boolq-validation"), max_windows=24, tasks=tuple(TASKS), limit=50
    )
    points: list[tuple[str, float, float]] = []
    line(HEADER)
    line(["---"] * len(HEADER))
    told = False
    for ratio in options.ratios:
        for recipe in options.recipes or known:
            if ratio != options.ratios[0] and recipe not in MAIN and not options.recipes:
                continue
            report = compress(options, model, recipe, ratio)
            dense, after = compare(RESULTS / f"{recipe}-{ratio}", model, settings, trust_remote_code=True)
            if not told:
                told = True
                line(
                    [
                        "dense",
                        1,
                        *(cell for item in dense.perplexities for cell in (f"{item.perplexity:.2f}", 0)),
                        *accuracies(dense, 2),
                        "",
                        "",
                    ]
                )
            cells: list[str] = []
            for perplexity, change in zip(after.perplexities, after.divergences, strict=True):
                cells += [f"{perplexity.perplexity:.4g}", f"{change.excess_nats_per_token:.3f}"]
            achieved = report["sizes"]["achieved_ratio"]
            points.append((recipe, achieved, after.divergences[0].excess_nats_per_token))
            peak = report["run"]["peak_memory_bytes"] / 1e6
            line(
                [
                    recipe,
                    f"{achieved:.4f}",
                    *cells,
                    *accuracies(after, 2),
                    f"{report['run']['seconds']:.0f}",
                    f"{peak:.0f}",
                ]
            )
    plot(points)


def plot(points: list[tuple[str, float, float]]) -> None:
    """Excess on the first text over the ratio: RESULTS/methods.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    best_first = sorted({point[0] for point in points}, key=lambda recipe: min(p[2] for p in points if p[0] == recipe))
    for index, recipe in enumerate(best_first):
        rows = sorted(point[1:] for point in points if point[0] == recipe)
        marker, color = "osv^D"[index % 5], matplotlib.colormaps["tab20"](index % 20)
        axes.plot([row[0] for row in rows], [row[1] for row in rows], marker=marker, color=color, label=recipe)
    axes.set(yscale="log", xlabel="decoder ratio", ylabel="excess nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.tight_layout()
    figure.savefig(RESULTS / "methods.png", dpi=110)
    print(f"\nplot: {RESULTS / 'methods.png'}")


if __name__ == "__main__":
    main()
