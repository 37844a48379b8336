"""What stays the same and what does not: the same command again, and with other threads, another dtype, another micro-batch. A table.

    python benchmarks/determinism.py [--recipes svd-llm loss-aware auto] [--tokens 4096]

SmolLM2-135M-Instruct (offline package), decoder ratio 0.8 (``auto``: 0.3 of the model). Beside the first run stand, for every other:
whether the bytes are the same, and KL(first || other) and perplexity in 8 windows of 1024 of the sciq validation passages.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

# name -> threads, and fields of the recipe
VARIANTS: dict[str, tuple[int, dict[str, object]]] = {
    "first": (1, {}),
    "again": (1, {}),
    "two threads": (2, {}),
    "two threads, again": (2, {}),
    "half the micro-batch": (1, {"micro_batch_tokens": 1024}),
    "float32 layers": (1, {"dtype": "float32"}),
}


def main() -> None:
    """Compress, compare, print."""
    import zoo
    from tables import compression, line

    from compress.pipeline import offline_model
    from compress.recipe import load_recipe
    from eval.quiet import quiet_libraries
    from eval.results import EvaluationSettings
    from eval.run import compare

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["svd-llm", "loss-aware", "auto"])
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    quiet_libraries()
    model = offline_model()
    settings = EvaluationSettings(texts=("sciq-validation",), max_windows=8, tasks=(), limit=None)
    line(["recipe", "run", "same bytes", "KL(first, this), nats", "perplexity"])
    line(["---"] * 5)
    for name in options.recipes:
        ratio, scope = ("0.3", "model") if name == "auto" else ("0.8", "decoder")
        with tempfile.TemporaryDirectory() as directory:
            first = Path(directory) / "first"
            for variant, (threads, changes) in VARIANTS.items():
                recipe, output = Path(directory) / "recipe.yaml", Path(directory) / variant.replace(" ", "-")
                recipe.write_text(yaml.safe_dump(load_recipe(name).override(changes).as_dict()))
                command = compression(model, recipe, ratio, scope, options.tokens, output, "--export", "dense")
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                subprocess.run(
                    command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
                )
                _, after = compare(output, first, settings)
                same = "yes" if zoo.content(output) == zoo.content(first) else "no"
                kl = f"{after.divergences[0].kl_nats_per_token:.2g}"
                line([name, variant, same, kl, f"{after.perplexities[0].perplexity:.4f}"])


if __name__ == "__main__":
    main()
