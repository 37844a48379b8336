"""Peak memory of a compression against depth and tokens, and against a 2 GB checkpoint; prints a table.

    python benchmarks/memory.py [--recipe svd-llm] [--large LAYERS --ratio R]

Synthetic llama-shaped checkpoints; each compression is a process of its own and reports its high-water mark.
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

SMALL = {"hidden": 512, "intermediate": 1376, "heads": 8, "kv_heads": 4, "vocabulary": 4096}
LARGE = {"hidden": 1536, "intermediate": 4096, "heads": 12, "kv_heads": 4, "vocabulary": 8192}
# (shape, layers, calibration tokens)
CASES = [(SMALL, 8, 4096), (SMALL, 32, 4096), (SMALL, 8, 16384), (LARGE, 40, 2048)]


def main() -> None:
    """Write, compress, print."""
    from synthetic import write

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="svd-llm")
    parser.add_argument("--ratio", default="0.8", help="of the decoder (%(default)s)")
    parser.add_argument(
        "--large", type=int, metavar="LAYERS", help="the wide checkpoint alone, of so many layers (40: 2 GB)"
    )
    options = parser.parse_args()
    recipe, cases = options.recipe, [(LARGE, options.large, 2048)] if options.large else CASES
    results = ROOT / "benchmarks" / "results" / "memory"
    results.mkdir(parents=True, exist_ok=True)
    text = results / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and so on. \n" * 3000, encoding="utf-8")
    print(
        "| layers | width | tokens | checkpoint MB | planned peak MB | measured peak MB | check's peak MB | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for shape, layers, tokens in cases:
        source, output = results / "source", results / "output"
        size = write(source, layers=layers, **shape)
        command = [sys.executable, str(ROOT / "run_pipeline.py"), "--model", str(source), "--recipe", recipe]
        command += [
            "--target-ratio",
            options.ratio,
            "--ratio-scope",
            "decoder",
            "--calibration",
            str(text),
            "--evaluate",
            "none",
        ]
        command += ["--calibration-tokens", str(tokens), "--output", str(output), "--fresh"]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        run = json.loads((output / "report.json").read_text())["run"]
        planned, peak, check = (
            run[key] / 1e6 for key in ("planned_memory_bytes", "peak_memory_bytes", "check_peak_memory_bytes")
        )
        cells = [
            layers,
            shape["hidden"],
            tokens,
            *(f"{value:.0f}" for value in (size / 1e6, planned, peak, check, run["seconds"])),
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        shutil.rmtree(source)


if __name__ == "__main__":
    main()
