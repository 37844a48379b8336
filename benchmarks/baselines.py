"""Every method at given decoder ratios on one model, one calibration text, two test texts; prints one table.

    python benchmarks/baselines.py --calibration train.txt --text test.txt --ratios 0.8

By default: SmolLM2-135M-Instruct (offline package), 128 windows of 512 tokens, seed 0, perplexity in 48 windows
of 1024 of TEXT and of the BoolQ validation passages. Outputs stay in benchmarks/results/baselines and are not
made again: a second start goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results" / "baselines"


def main() -> None:
    """Compress with each recipe, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="offline")
    parser.add_argument("--calibration", default="offline")
    parser.add_argument("--text", default="sciq-validation", help="the first test text; BoolQ validation is the second")
    parser.add_argument("--recipes", nargs="+", default=["svd", "asvd", "svd-llm", "llm-rom"])
    parser.add_argument("--ratios", nargs="+", default=["0.8"])
    parser.add_argument("--windows", type=int, default=48)
    options = parser.parse_args()

    from compress.pipeline import offline_model
    from eval.quiet import quiet_libraries
    from eval.results import EvaluationSettings
    from eval.run import compare

    quiet_libraries()
    model = offline_model() if options.model == "offline" else Path(options.model)
    settings = EvaluationSettings(texts=(options.text, "boolq-validation"), max_windows=options.windows)
    rows: list[list[str]] = []
    for recipe in options.recipes:
        for ratio in options.ratios:
            output = RESULTS / f"{model.name}-{recipe}-{ratio}"
            command = [sys.executable, str(ROOT / "run_pipeline.py"), "--model", str(model), "--recipe", recipe]
            command += ["--target-ratio", ratio, "--ratio-scope", "decoder", "--calibration", options.calibration]
            command += ["--evaluate", "none", "--output", str(output), "--work-dir", str(RESULTS / f"{recipe}.work")]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
            dense, compressed = compare(output, model, settings, trust_remote_code=True)
            report = json.loads((output / "report.json").read_text())
            if not rows:
                names = [Path(item.text).name for item in dense.perplexities]
                rows.append(
                    [
                        "method",
                        "ratio",
                        *[f"{name}: {what}" for name in names for what in ("perplexity", "excess", "x dense")],
                    ]
                )
                rows[0] += ["seconds", "peak MB"]
                figures = [(f"{item.perplexity:.2f}", "0", "1") for item in dense.perplexities]
                rows.append(["dense", "1", *[cell for triple in figures for cell in triple], "", ""])
            cells = [recipe, f"{report['sizes']['achieved_ratio']:.4f}"]
            for before, after in zip(dense.perplexities, compressed.perplexities, strict=True):
                cells += [f"{after.perplexity:.5g}", f"{after.nats_per_token - before.nats_per_token:.3f}"]
                cells.append(f"{after.perplexity / before.perplexity:.3g}")
            rows.append([*cells, f"{report['run']['seconds']:.0f}", f"{report['run']['peak_memory_bytes'] / 1e6:.0f}"])
    tokens = report["calibration"] or {"tokens": 0, "text": "no"}
    print(
        f"\n{model.name}, decoder scope, {tokens['tokens']:,} calibration tokens of {Path(tokens['text']).name}, seed 0;"
    )
    print(
        f"perplexity in {options.windows} windows of 1024; {platform.machine()}, {report['run']['threads']} threads, {compressed.dtype}\n"
    )
    for row in rows:
        print("| " + " | ".join(row) + " |")
        if row is rows[0]:
            print("|" + "---|" * len(row))


if __name__ == "__main__":
    main()
