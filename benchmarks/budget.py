"""One budget for everything against one choice for everything, at the same bytes.

    python benchmarks/budget.py --calibration train.txt --text test.txt

``auto`` at 0.5, 0.4, 0.3 and 0.25 of the model's bytes; then GPTQ and two-sided rounding with the same bits (groups of 64) for every
linear, the embedding and the head, each beside ``auto`` cut to exactly those bytes. SmolLM2-135M-Instruct (offline package),
128 windows of 512 tokens, seed 0; perplexity in 24 windows of 1024 of TEXT and of the BoolQ validation passages. What is
finished stays in benchmarks/results/budget.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tables import line, study  # noqa: E402

from checkpoint.forms import Grid, Spec  # noqa: E402
from compress.plan import make_source  # noqa: E402
from compress.recipe import load_recipe  # noqa: E402
from eval.results import EvaluationSettings  # noqa: E402
from eval.run import compare  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "budget"
BITS = (8, 6, 5, 4, 3)
RATIOS = ("0.5", "0.4", "0.3", "0.25")
ONE_CHOICE = {"allocation": "uniform", "correction_rank": "0", "bits": "3-6,8"}
# name -> recipe, and what of it is changed
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "auto": ("auto", {}),
    "GPTQ": ("quantized", {**ONE_CHOICE, "quantizer": "gptq", "token_weights": "equal"}),
    "two-sided rounding": ("quantized", ONE_CHOICE),
}


def exact_ratios(model: Path) -> dict[int, str]:
    """The part of the model's bytes that everything on so many bits takes."""
    source, structure, _ = make_source(model, load_recipe("quantized"), False)
    packed = [*structure.linears, *structure.ends]
    ratios = {}
    for bits in BITS:
        saved = sum(item.nbytes - Spec("packed", 0, Grid(bits, 64)).nbytes(item.d_out, item.d_in, 2) for item in packed)
        ratios[bits] = f"{1 - (saved - 1) / source.nbytes:.9f}"
    return ratios


def main() -> None:
    """Compress, measure, print."""
    options = study(__doc__)
    model = options.model
    exact = exact_ratios(model)
    RESULTS.mkdir(parents=True, exist_ok=True)
    settings = EvaluationSettings(texts=(options.text, "boolq-validation"), max_windows=24, tasks=(), limit=None)
    line(["asked", "", "bytes", "bits per decoder weight", "predicted", *("ppl", "excess", "KL") * 2])
    line(["---"] * 11)
    for asked, ratio in [
        *((item, item) for item in RATIOS),
        *((f"{bits} bits", ratio) for bits, ratio in exact.items()),
    ]:
        for name, (base, changes) in WAYS.items():
            if name != "auto" and asked in RATIOS:
                continue
            slug = name.replace(" ", "-")
            output = RESULTS / f"{slug}-{ratio}"
            if not (output / "report.json").exists():
                recipe = RESULTS / f"{slug}.yaml"
                recipe.write_text(yaml.safe_dump(load_recipe(base).override({"name": slug, **changes}).as_dict()))
                command = [
                    sys.executable,
                    str(ROOT / "run_pipeline.py"),
                    "--model",
                    str(model),
                    "--recipe",
                    str(recipe),
                ]
                command += ["--target-ratio", ratio, "--calibration", options.calibration, "--evaluate", "none"]
                command += ["--output", str(output), "--work-dir", str(RESULTS / f"{slug}.work")]
                subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            report = json.loads((output / "report.json").read_text())
            _, after = compare(output, model, settings, trust_remote_code=True)
            sizes = report["sizes"]
            cells = [f"{sizes['achieved_ratio']:.4f}", f"{sizes['bits_per_decoder_weight']:.2f}"]
            cells.append(f"{report['predicted_loss_nats_per_token']:.4f}")
            for perplexity, change in zip(after.perplexities, after.divergences, strict=True):
                cells.append(f"{perplexity.perplexity:.4g}")
                cells += [f"{change.excess_nats_per_token:.4f}", f"{change.kl_nats_per_token:.4f}"]
            line([asked, name, *cells])


if __name__ == "__main__":
    main()
