"""Wall and processor seconds of whole runs, beside the least that this machine needs for them (roofline.py); prints a table.

    python benchmarks/speed.py [--model DIR] [--recipes auto] [--calibration-tokens N] [--target-ratio R] [--ratio-scope SCOPE] [--stages]

Every run starts anew, in a process of its own, and is not evaluated. Processor seconds are those of that process and of all that it
started. The machine is measured first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from roofline import arguments, limits, measured, of_a_model, print_machine  # noqa: E402
from tables import compression, line  # noqa: E402

from compress.plan import Plan  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "speed"
COLUMNS = ("stage", "wall s", "CPU s", "peak MB", "limit s", "wall / limit")
NEXT_TO_NOTHING = 0.05  # seconds: a multiple of less says nothing
ALL = "all"  # of a run, with what is before and between its stages


@dataclass(frozen=True)
class Speed:
    """Seconds of a whole run, by the clock and of processors, and its report.json."""

    wall: float
    processor: float
    report: Mapping[str, Any]


def run(recipe_or_file: str, plan: Plan, *more: str) -> Speed:
    """Compress as planned, with ``more`` flags, from the beginning; nothing is left (subprocess.CalledProcessError where it fails)."""
    recipe, output = plan.recipe, RESULTS / "output"
    command = compression(
        plan.source.directory,
        recipe_or_file,
        f"{plan.ratio:g}",
        recipe.ratio_scope,
        recipe.calibration_tokens,
        output,
        *("--calibration", recipe.calibration, "--fresh", *more),
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(RESULTS)
    return Speed(wall, usage.ru_utime + usage.ru_stime, report)


def rows(speed: Speed, least: Mapping[str, float], every_stage: bool) -> list[Sequence[Any]]:
    """``COLUMNS`` of the whole run, and of every stage; ``least`` is the limit by stage."""

    def row(stage: str, wall: float, processor: str, peak: int, limit: float) -> list[str]:
        multiple = f"{wall / limit:.1f}" if limit > NEXT_TO_NOTHING else ""
        return [stage, f"{wall:.1f}", processor, f"{peak / 1e6:.0f}", f"{limit:.2f}", multiple]

    peak, limit = speed.report["run"]["peak_memory_bytes"], sum(least.values())
    found = [row(ALL, speed.wall, f"{speed.processor:.1f}", peak, limit)]
    if every_stage:
        stages = speed.report["stages"]
        found += [row(item["stage"], item["seconds"], "", item["peak_bytes"], least[item["stage"]]) for item in stages]
    return found


def main() -> None:
    """Plan, measure the machine, run, print."""
    parser = arguments(__doc__)
    parser.add_argument("--stages", action="store_true", help="a row for every stage too")
    options, plans = of_a_model(parser)
    machine = measured(plans.values(), ROOT / "benchmarks" / "results")
    print_machine(machine)
    line(["recipe", "tokens", *COLUMNS])
    line(["---"] * (2 + len(COLUMNS)))
    for recipe, plan in plans.items():
        for row in rows(run(recipe, plan), limits(plan, machine), options.stages):
            line([recipe, plan.recipe.calibration_tokens, *row])


if __name__ == "__main__":
    main()
