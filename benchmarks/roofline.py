"""The least that each stage of a run has to do (least_work.py), and the seconds that this machine needs for it; prints tables.

    python benchmarks/roofline.py [--model DIR] [--recipes auto] [--calibration-tokens N] [--target-ratio R] [--ratio-scope SCOPE]

A stage takes its arithmetic or its disk, whichever is longer: one hides behind the other. Disk is measured past the page cache; a
model that stays there can be read faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from least_work import Work, work  # noqa: E402
from machine import CHOLESKY, DTYPES, LARGEST, Machine, Shape, measure  # noqa: E402
from tables import line  # noqa: E402

from compress.pipeline import offline_model  # noqa: E402
from compress.plan import Plan, make_plan, make_source  # noqa: E402
from compress.recipe import load_recipe  # noqa: E402


def limits(plan: Plan, machine: Machine) -> dict[str, float]:
    """Seconds by stage, in the order and with the names of the stages in report.json."""
    return {stage: item.seconds(machine) for stage, item in work(plan).items()}


def planned(model: Path, recipe: str, ratio: float, **changes: Any) -> Plan:
    """The plan of a run with other fields of the recipe (None: its own); UserError where there is none."""
    wanted = load_recipe(recipe).override(changes)
    source, structure, reason = make_source(model, wanted, False)
    return make_plan(source, structure, wanted, ratio, reason)


def measured(plans: Iterable[Plan], directory: Path) -> Machine:
    """This machine at the sizes of some plans: a micro-batch through each linear, and every side that is decomposed."""
    shapes, sides = set[Shape](), set[int]()
    for plan in plans:
        tokens = plan.recipe.micro_batch * plan.recipe.sequence_length
        shapes |= {(tokens, linear.d_in, linear.d_out) for linear in plan.structure.linears}
        sides |= {side for item in work(plan).values() for side in item.eigen}
    directory.mkdir(parents=True, exist_ok=True)
    return measure(shapes, sides, directory)


def print_machine(machine: Machine) -> None:
    """The rates as a Markdown table."""
    line(["this machine", f"with {torch.get_num_threads()} threads"])
    line(["---"] * 2)
    for kind, rate in machine.flops.items():
        line([f"{kind} {'of the widest side' if kind == CHOLESKY else 'products'}", f"{rate / 1e12:.3f} TFLOP/s"])
    for side, seconds in machine.eigen.items():
        line([f"eigenvectors of {side}", f"{seconds:.3g} s in float64, {machine.eigen_single[side]:.3g} s in float32"])
    line([f"eigenvectors above {LARGEST}", "scaled by n^3"])
    line(["disk", f"{machine.reading / 1e9:.2f} GB/s read, {machine.writing / 1e9:.2f} GB/s written"])
    print()


def print_work(recipe: str, stages: Mapping[str, Work], machine: Machine) -> None:
    """Rows of a recipe's stages, and of all."""
    seconds = {stage: item.seconds(machine) for stage, item in stages.items()}
    rows = {**stages, "all": sum(stages.values(), Work())}
    for stage, item in rows.items():
        bytes_of = [f"{item.reads / 1e9:.3f}", f"{item.writes / 1e9:.3f}"]
        flops = [f"{item.flops[kind] / 1e12:.4g}" for kind in (*DTYPES, CHOLESKY)]
        limit = seconds.get(stage, sum(seconds.values()))
        line([recipe, stage, *bytes_of, *flops, f"{item.eigen_seconds(machine):.3g}", f"{limit:.3g}"])


def arguments(description: str | None, scope: str = "model") -> argparse.ArgumentParser:
    """The flags that say which recipes are run, and to which size."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["auto"])
    parser.add_argument("--target-ratio", type=float, default=0.5)
    parser.add_argument("--ratio-scope", default=scope, choices=["model", "decoder"])
    return parser


def of_a_model(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, Plan]]:
    """Flags of a study of one model (by default the offline one), and the plans of its recipes."""
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", help="the recipe's by default, as are the tokens")
    parser.add_argument("--calibration-tokens", type=int)
    options = parser.parse_args()
    model = options.model or offline_model()
    changes = {name: getattr(options, name) for name in ("ratio_scope", "calibration", "calibration_tokens")}
    return options, {recipe: planned(model, recipe, options.target_ratio, **changes) for recipe in options.recipes}


def main() -> None:
    """Plan, measure the machine, print."""
    _, plans = of_a_model(arguments(__doc__))
    machine = measured(plans.values(), ROOT / "benchmarks" / "results")
    print_machine(machine)
    columns = [*("recipe", "stage", "reading GB", "writing GB"), *(f"TFLOP {kind}" for kind in (*DTYPES, CHOLESKY))]
    columns += ["eigen s", "limit s"]
    line(columns)
    line(["---"] * len(columns))
    for recipe, plan in plans.items():
        print_work(recipe, work(plan), machine)


if __name__ == "__main__":
    main()
