"""The papers' own claims, each tested on one model: what a rule, a refit, an allocation or a calibration text changes.

    python benchmarks/claims.py --calibration train.txt --text test.txt

SmolLM2-135M-Instruct (offline package), decoder ratio 0.8, 128 windows of 512 tokens, seed 0; perplexity in 24 windows of 1024 of
TEXT and of the BoolQ validation passages; the rows about calibration text have the seven zero-shot tasks too, 50 documents
each. What is finished stays in benchmarks/results/claims.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tables import accuracies, line, study  # noqa: E402

from eval.results import EvaluationSettings  # noqa: E402
from eval.run import compare  # noqa: E402
from eval.task_files import TASKS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "claims"
RATIO = "0.8"
# claim -> its rows: a name, a recipe, what is changed in its YAML
CLAIMS: dict[str, dict[str, tuple[str, dict[str, str]]]] = {
    "LoRAP: the least important 1 % of channels are worth keeping": {
        "lorap": ("lorap", {}),
        "lorap, no rule": ("lorap", {"least_kept": "0.0"}),
        "lorap-repair": ("lorap-repair", {}),
        "lorap-repair, no rule": ("lorap-repair", {"least_kept": "0.0"}),
    },
    "WeLore: ranks by one threshold on the spectra": {
        "svd-llm": ("svd-llm", {}),
        "svd-llm, WeLore's ranks": ("svd-llm", {"allocation": "welore"}),
    },
    "LoRAP: query and key can do with lower ranks than value and output": {
        "svd-llm, q, k : v, o = 1 : 3": ("svd-llm", {"allocation": "attention-types"}),
    },
    "refits": {
        "svd-llm, update": ("svd-llm", {"refit": "update"}),
        "svd-llm, anchored, ridge 0.001": ("svd-llm", {"refit": "anchored", "refit_ridge": "0.001"}),
        "llm-rom, anchored, ridge 0.001": ("llm-rom", {"refit": "anchored", "refit_ridge": "0.001"}),
        "loss-aware": ("loss-aware", {}),
        "loss-aware, anchored, ridge 0.1": ("loss-aware", {"refit": "anchored", "refit_ridge": "0.1"}),
    },
    "LLM-ROM: against pruning of the same size; calibrated on its tasks' train splits, 512 x 128": {
        "llm-rom": ("llm-rom", {}),
        "llm-rom, task text": ("llm-rom", {"calibration": "offline-tasks", "sequence_length": "128"}),
        "lorap, task text": ("lorap", {"calibration": "offline-tasks", "sequence_length": "128"}),
    },
}
ROLES = ("welore", "loss-aware")  # recipes whose ranks by role are shown


def produce(options: argparse.Namespace, name: str, recipe: str, changes: dict[str, str]) -> Path:
    """Run the public command on a recipe with changed fields, unless its output is there."""
    slug = name.replace(",", "").replace(" ", "_").replace(":", "-")
    output = RESULTS / slug
    if not (output / "report.json").exists():
        text = (ROOT / "configs" / f"{recipe}.yaml").read_text()
        kept = [row for row in text.splitlines() if row.split(":")[0] not in changes]
        changed = RESULTS / f"{slug}.yaml"
        changed.write_text("\n".join([*kept, *(f"{key}: {value}" for key, value in changes.items())]) + "\n")
        command = [
            sys.executable,
            str(ROOT / "run_pipeline.py"),
            "--model",
            str(options.model),
            "--recipe",
            str(changed),
        ]
        command += ["--target-ratio", RATIO, "--ratio-scope", "decoder", "--evaluate", "none", "--output", str(output)]
        if "calibration" not in changes:
            command += ["--calibration", options.calibration]
        # refits of one recipe share what was collected of the dense model; other statistics are other work
        collected = "-".join([recipe, *(value for key, value in changes.items() if not key.startswith("refit"))])
        command += ["--work-dir", str(RESULTS / f"{collected}.work")]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return output


def ranks_by_role(output: Path) -> dict[str, float]:
    """The mean part of its numbers that each kind of matrix keeps."""
    kept: dict[str, list[float]] = {}
    with (output / "matrices.csv").open() as file:
        for row in csv.DictReader(file):
            kept.setdefault(row["matrix"].rpartition(".")[2], []).append(float(row["kept"]))
    return {role: sum(values) / len(values) for role, values in kept.items()}


def main() -> None:
    """Compress, measure, print."""
    options = study(__doc__)
    RESULTS.mkdir(parents=True, exist_ok=True)
    texts = (options.text, "boolq-validation")
    for claim, rows in CLAIMS.items():
        tasks = tuple(TASKS) if any("calibration" in changes for _, changes in rows.values()) else ()
        print(f"\n{claim}\n", flush=True)
        line(["", "decoder ratio", *("ppl", "excess") * 2, *tasks, *(["mean acc"] if tasks else [])])
        line(["---"] * (6 + len(tasks) + bool(tasks)))
        for name, (recipe, changes) in rows.items():
            output = produce(options, name, recipe, changes)
            settings = EvaluationSettings(texts=texts, max_windows=24, tasks=tasks, limit=50)
            _, after = compare(output, options.model, settings, trust_remote_code=True)
            cells: list[str] = []
            for perplexity, change in zip(after.perplexities, after.divergences, strict=True):
                cells += [f"{perplexity.perplexity:.4g}", f"{change.excess_nats_per_token:.3f}"]
            line([name, RATIO, *cells, *(accuracies(after, 2) if tasks else [])])
    print("\nwhat each kind of matrix keeps of its numbers\n", flush=True)
    for index, recipe in enumerate(ROLES):
        kept = ranks_by_role(produce(options, recipe, recipe, {}))
        if not index:
            line(["", *kept])
            line(["---"] * (1 + len(kept)))
        line([recipe, *(f"{value:.2f}" for value in kept.values())])


if __name__ == "__main__":
    main()
