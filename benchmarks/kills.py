"""SIGKILL at random moments of runs on a real model; each goes on, and ends in the bytes of a run that was left alone. Prints a table.

    python benchmarks/kills.py [--model DIR] [--kills 100] [--recipes NAME ...] [--seed S]

Every recipe is run once as it is. Then its command is started again and again, each time killed after a delay that is drawn evenly from
nothing to a recipe's longest, until it ends; then from the beginning, until it has had its share of the kills.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

# ratio, and the longest delay in seconds: starting takes five of them, a layer of auto ten;
# one-shot, sequential, backward, packed on the compressed model, everything
RECIPES = {
    "svd-llm": ("0.6", 20),
    "llm-rom": ("0.6", 20),
    "loss-aware": ("0.6", 20),
    "gptq": ("0.266", 20),
    "auto": ("0.3", 60),
}


def where(output: Path) -> str:
    """How far a killed run had come, from what it left."""
    work = output.with_name(output.name + ".work")
    if output.with_name(output.name + ".partial").exists():
        return "writing, checking"
    if any(path.suffix == ".safetensors" for path in work.glob("*/*")):
        return "decomposing"
    return "hidden states" if any(work.glob("hidden-*/*")) else "starting"


def killed_until_done(arguments: list[str], output: Path, draw: random.Random, longest: float, most: int) -> list[str]:
    """Kill the command up to ``most`` times; then, or if a delay is long enough, it ends. Where it was each time."""
    found: list[str] = []
    while True:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = process.wait(draw.uniform(0, longest) if len(found) < most else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            found.append(where(output))
            continue
        if code:
            raise RuntimeError(f"exit code {code} after {found}")
        return found


def main() -> None:
    """All recipes; exit code 1 if anything was lost."""
    import zoo
    from tables import compression, line

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="offline")
    parser.add_argument("--kills", type=int, default=100, help="of all recipes together (%(default)s)")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    places = ("starting", "hidden states", "decomposing", "writing, checking")
    line(["recipe", "kills", *places, "runs to the end", "of the same bytes", "seconds"])
    line(["---"] * 9)
    share, lost = -(-options.kills // len(options.recipes)), 0
    for recipe in options.recipes:
        started = time.monotonic()
        draw = random.Random(f"{options.seed} {recipe}")
        with tempfile.TemporaryDirectory() as directory:
            output = Path(directory) / "out"
            scope = "model" if recipe == "auto" else "decoder"
            ratio, longest = RECIPES[recipe]
            arguments = compression(options.model, recipe, ratio, scope, 4096, output)
            subprocess.run(arguments, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            whole, found, runs, same = zoo.content(output), list[str](), 0, 0
            while len(found) < share:
                for path in Path(directory).iterdir():
                    shutil.rmtree(path)
                found += killed_until_done(arguments, output, draw, longest, share - len(found))
                runs, same = runs + 1, same + (zoo.content(output) == whole)
        counts = Counter(found)
        seconds = f"{time.monotonic() - started:.0f}"
        line([recipe, len(found), *(counts[place] for place in places), runs, same, seconds])
        lost += runs - same
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
