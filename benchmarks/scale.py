"""Seconds and memory at the shapes of real models, by depth and by tokens, beside the least; prints tables.

    python benchmarks/scale.py [--shape llama-3-8b] [--recipes auto] [--layers 2 4 8] [--tokens 2048 4096 8192] [--vocabulary 8192]
                               [--target-ratio R] [--ratio-scope SCOPE] [--memory-limit 6GB]

Slices of a model of random weights (synthetic.py): what one more layer takes, and what one more token takes, is the difference of
two runs. ``--vocabulary`` gives the embedding and the head fewer rows: theirs are not the layers' costs.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import Machine  # noqa: E402
from roofline import arguments, limits, measured, planned, print_machine  # noqa: E402
from speed import COLUMNS, Speed, rows, run  # noqa: E402
from synthetic import SHAPES, shape_config, write_config, write_text  # noqa: E402
from tables import line  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "scale"
Figures = dict[
    tuple[str, int, int], tuple[float, float, float]
]  # recipe, layers, tokens: wall, processor, least seconds


def main() -> None:
    """Write, run, print; the sources are removed."""
    parser = arguments(__doc__, scope="decoder")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--vocabulary", type=int, help="rows of the embedding and the head (those of the shape)")
    parser.add_argument("--memory-limit", help="as run_pipeline.py has it")
    options = parser.parse_args()
    more = ["--memory-limit", options.memory_limit] if options.memory_limit else []
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = write_text(RESULTS)
    machine: Machine | None = None
    figures: Figures = {}
    for layers in options.layers:
        source = RESULTS / "source"
        write_config(source, shape_config(options.shape, layers, options.vocabulary))
        changes = {"ratio_scope": options.ratio_scope, "calibration": str(text)}
        plans = {
            (recipe, tokens): planned(source, recipe, options.target_ratio, calibration_tokens=tokens, **changes)
            for recipe in options.recipes
            for tokens in options.tokens
        }
        if machine is None:  # the sizes are those of every depth
            machine = measured(plans.values(), RESULTS)
            print_machine(machine)
            line(["recipe", "layers", "tokens", *COLUMNS])
            line(["---"] * (3 + len(COLUMNS)))
        for (recipe, tokens), plan in plans.items():
            found, least = run(recipe, plan, *more), limits(plan, machine)
            for row in rows(found, least, every_stage=True):
                line([recipe, layers, tokens, *row])
            figures[recipe, layers, tokens] = _figures(found, least)
        shutil.rmtree(source)
    shutil.rmtree(RESULTS)
    print_differences(options.recipes, options.layers, options.tokens, figures)


def _figures(found: Speed, least: Mapping[str, float]) -> tuple[float, float, float]:
    return found.wall, found.processor, sum(least.values())


def print_differences(recipes: list[str], layers: list[int], tokens: list[int], figures: Figures) -> None:
    """What one more layer takes between two depths, and 1000 more tokens between two numbers of them."""
    print()
    line(["recipe", "layers", "tokens", "of one more", "wall s", "core-s", "limit s", "wall / limit"])
    line(["---"] * 8)
    for recipe in recipes:
        for count in tokens:
            for fewer, more in pairwise(layers):
                steps = [(recipe, fewer, count), (recipe, more, count)]
                line([recipe, f"{fewer} to {more}", count, "layer", *_difference(figures, steps, more - fewer)])
        for depth in layers:
            for fewer, more in pairwise(tokens):
                steps = [(recipe, depth, fewer), (recipe, depth, more)]
                line(
                    [
                        *(recipe, depth, f"{fewer} to {more}", "thousand tokens"),
                        *_difference(figures, steps, (more - fewer) / 1000),
                    ]
                )


def _difference(figures: Figures, steps: list[tuple[str, int, int]], units: float) -> list[str]:
    first, last = (figures[step] for step in steps)
    wall, processor, limit = ((b - a) / units for a, b in zip(first, last, strict=True))
    return [f"{wall:.2f}", f"{processor:.2f}", f"{limit:.2f}", f"{wall / limit:.1f}" if limit else ""]


if __name__ == "__main__":
    main()
