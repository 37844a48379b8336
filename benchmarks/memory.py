"""Planned and measured peak memory of every stage, against depth, width, vocabulary and tokens; prints a table.

    python benchmarks/memory.py [--recipes svd-llm auto] [--cases NAME ...] [--stages] [--memory-limit 1GB]

Synthetic llama-shaped checkpoints; each compression is a process of its own, and each of its stages reports its high-water mark.
``large`` is the checkpoint of 2 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SMALL = {"hidden": 512, "intermediate": 1408, "heads": 8, "kv_heads": 4, "vocabulary": 4096}
WIDE = {"hidden": 1536, "intermediate": 4096, "heads": 12, "kv_heads": 4, "vocabulary": 8192}
WIDER = {"hidden": 2048, "intermediate": 5632, "heads": 16, "kv_heads": 8, "vocabulary": 8192}
# name: (shape, layers, calibration tokens)
CASES = {
    "base": (SMALL, 4, 4096),
    "depth": (SMALL, 24, 4096),
    "tokens": (SMALL, 4, 32768),
    "vocabulary": (SMALL | {"vocabulary": 131072}, 4, 4096),
    "width": (WIDE, 2, 4096),
    "wider": (WIDER, 2, 4096),
    "large": (WIDE, 40, 2048),
}
RATIOS = {"gptq": "0.266"}  # of the decoder: 4 bits in groups of 64 for every linear; of the whole model for auto
COLUMNS = ("recipe", "case", "checkpoint MB", "stage", "planned MB", "measured MB", "planned / measured")


def main() -> None:
    """Write, compress, print."""
    from synthetic import write, write_text
    from tables import compression, line

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["svd-llm", "llm-rom", "gptq", "loss-aware", "auto"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=[name for name in CASES if name != "large"])
    parser.add_argument("--memory-limit", help="as run_pipeline.py has it")
    parser.add_argument("--stages", action="store_true", help="every stage, not only the one with the highest peak")
    options = parser.parse_args()
    results = ROOT / "benchmarks" / "results" / "memory"
    results.mkdir(parents=True, exist_ok=True)
    text = write_text(results)
    line(COLUMNS)
    line(["---"] * len(COLUMNS))
    for case in options.cases:
        shape, layers, tokens = CASES[case]
        source, output = results / f"source-{case}", results / "output"
        size = write(source, layers=layers, **shape)
        for recipe in options.recipes:
            ratio, scope = RATIOS.get(recipe, "0.5"), "model" if recipe == "auto" else "decoder"
            command = compression(source, recipe, ratio, scope, tokens, output, "--calibration", str(text), "--fresh")
            command += ["--memory-limit", options.memory_limit] if options.memory_limit else []
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            report = json.loads((output / "report.json").read_text())
            for row in rows(report, options.stages):
                line([recipe, case, f"{size / 1e6:.0f}", *row])
        shutil.rmtree(source)


def rows(report: dict, every_stage: bool) -> list[tuple[str, ...]]:
    """Stage, planned, measured, and their quotient: of the whole run, and of every stage."""
    run = report["run"]
    found = [("all", run["planned_memory_bytes"], run["peak_memory_bytes"])]
    if every_stage:
        found += [(item["stage"], item["planned_bytes"], item["peak_bytes"]) for item in report["stages"]]
    return [
        (stage, f"{planned / 1e6:.0f}", f"{peak / 1e6:.0f}", f"{planned / peak:.2f}") for stage, planned, peak in found
    ]


if __name__ == "__main__":
    main()
