"""Quantizers and corrections of their error side by side, all from one set of statistics of the dense model.

    python benchmarks/quantization.py --calibration train.txt --text test.txt

{RTN, GPTQ} x {none, LQER, L2QER, EoRA, two-sided} at 4, 3 and 2 bits in groups of 64, rank 32 in 16 bits and allocated rank of the same
bytes; GPTQ with tokens weighted by their gradient and two-sided rounding (ours), with and without; plain GPTQ of more bits, for
equal bytes. By default SmolLM2-135M-Instruct (offline package), 128 windows of 512 tokens, seed 0; perplexity in 24 windows of
1024 (``--windows``) of TEXT and of the BoolQ validation passages. Layers and rows that are finished stay in
benchmarks/results/quantization.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tables import line  # noqa: E402

from calibration.moments import Moments, module_weight  # noqa: E402
from calibration.replay import opened  # noqa: E402
from calibration.sweep import Sweep  # noqa: E402
from checkpoint.forms import Grid, Spec  # noqa: E402
from compress.allocations import ALLOCATIONS, Curve  # noqa: E402
from compress.candidates import Quantization, sampled_losses  # noqa: E402
from compress.parts import Factors  # noqa: E402
from compress.pipeline import calibration_windows, offline_model  # noqa: E402
from compress.plan import make_source  # noqa: E402
from compress.recipe import load_recipe  # noqa: E402
from eval.models import Subject, evaluation_dtype  # noqa: E402
from eval.perplexity import perplexity  # noqa: E402
from eval.quiet import quiet_libraries  # noqa: E402
from eval.texts import load_text  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quantization"
GROUP, RANK, MOST = 64, 32, 96  # MOST: ranks that an allocation may give
CORRECTIONS = {"LQER": "svd", "L2QER": "l2qer", "EoRA": "svd-llm", "two-sided": "two-sided"}
# name -> quantizer, tokens weighted, bits, corrections
QUANTIZERS: dict[str, tuple[str, bool, tuple[int, ...], tuple[str, ...]]] = {
    "RTN": ("rtn", False, (4, 3, 2), tuple(CORRECTIONS)),
    "GPTQ": ("gptq", False, (6, 5, 4, 3, 2), tuple(CORRECTIONS)),
    "GPTQ weighted": ("gptq", True, (4, 3, 2), ("two-sided",)),
    "two-sided rounding": ("two-sided", True, (6, 5, 4, 3, 2), ("two-sided",)),
}
CORRECTED_BITS = (4, 3, 2)
NEEDS = frozenset().union(
    *(
        Quantization(quantizer, weighted, 0.01, decomposition, 1e-3).needs
        for quantizer, weighted, _, _ in QUANTIZERS.values()
        for decomposition in CORRECTIONS.values()
    )
)


def collect(options: argparse.Namespace) -> None:
    """Quantize every linear in every way, layer by layer from the last: a file a layer, with weights, factors and losses."""
    recipe = load_recipe("quantized").override({"calibration": options.calibration, "ratio_scope": "decoder"})
    source, structure, _ = make_source(
        offline_model() if options.model == "offline" else Path(options.model), recipe, False
    )
    windows = calibration_windows(source, recipe)
    assert windows is not None
    sweep = Sweep(source, structure, windows, RESULTS / "hidden", recipe.micro_batch, recipe.gradient_windows)
    if all((RESULTS / f"{layer.index}.safetensors").exists() for layer in structure.layers):
        return
    sweep.embed()
    for layer in structure.layers:
        if not sweep.path(layer.index + 1).exists():
            with opened(source, layer) as open_layer:
                sweep.advance_and_sum(open_layer, [layer.linears], NEEDS)
    sweep.start_backward(recipe.fisher, recipe.seed)
    for layer in reversed(structure.layers):
        target = RESULTS / f"{layer.index}.safetensors"
        if target.exists():
            continue
        with opened(source, layer) as open_layer:
            moments = sweep.collect_backward(open_layer, layer.linears, NEEDS)
            tensors: dict[str, torch.Tensor] = {}
            for linear in layer.linears:
                weight = module_weight(open_layer.linear(linear.local)).double()
                of_linear = {
                    f"{linear.name}|{key}": value for key, value in every(weight, moments[linear.local]).items()
                }
                tensors |= of_linear
        save_file(tensors, target.with_suffix(".tmp"))
        target.with_suffix(".tmp").rename(target)
        print(f"layer {layer.index} quantized", file=sys.stderr, flush=True)
    sweep.close()


def every(weight: torch.Tensor, moments: Moments) -> dict[str, torch.Tensor]:
    """Weights on every grid, factors of every correction, and losses in nats by rank, of one weight ``(d_out, d_in)`` float64."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (quantizer, weighted, bits, corrections) in QUANTIZERS.items():
        grids = [Grid(count, GROUP) for count in bits]
        plain = Quantization(quantizer, weighted, 0.01, "two-sided", 1e-3)
        for grid, quantized in zip(grids, plain.codes(weight, grids, moments, torch.bfloat16), strict=True):
            key = f"{name}|{grid.bits}"
            dense = quantized.dense()
            tensors[f"{key}|weight"] = dense.bfloat16()
            error = weight - dense.double()
            nothing = Factors(error[:, :0], error[:0], torch.zeros(1))
            tensors[f"{key}|none|loss"] = sampled_losses(error, nothing, moments)
            for correction in corrections if grid.bits in CORRECTED_BITS else ():
                quantization = Quantization(quantizer, weighted, 0.01, CORRECTIONS[correction], 1e-3)
                factors = quantization.factors(error, moments, MOST)
                tensors[f"{key}|{correction}|a"] = factors.a.bfloat16().contiguous()
                tensors[f"{key}|{correction}|b"] = factors.b.bfloat16().contiguous()
                tensors[f"{key}|{correction}|loss"] = sampled_losses(error, factors, moments)
    return tensors


def rows() -> list[tuple[str, int, str, str]]:
    """``(quantizer, bits, correction, ranks)`` of every row."""
    found = []
    for name, (_, _, bits, corrections) in QUANTIZERS.items():
        for count in bits:
            found.append((name, count, "none", "0"))
            for correction in corrections if count in CORRECTED_BITS else ():
                found.append((name, count, correction, "fixed"))
                if correction in ("EoRA", "two-sided"):
                    found.append((name, count, correction, "allocated"))
    return found


def ranks_of(
    row: tuple[str, int, str, str], losses: Mapping[str, torch.Tensor], shapes: Mapping[str, Any]
) -> dict[str, int]:
    """The rank of every linear's correction: 0, ``RANK``, or pooled by predicted loss within the bytes that ``RANK`` takes."""
    _, bits, correction, kind = row
    if kind != "allocated":
        return dict.fromkeys(shapes, 0 if correction == "none" else RANK)
    curves, fixed = [], 0
    for name, (d_out, d_in) in shapes.items():
        # a choice is a rank and one more: choice 1 is no correction, and what is dense is out of reach
        sizes = (0, *(1 + 2 * rank * (d_out + d_in) for rank in range(MOST + 1)))
        curves.append(Curve(1 << 40, sizes, (0.0, *losses[name].tolist())))
        fixed += sizes[RANK + 1]
    return {
        name: (choice or 1) - 1
        for name, choice in zip(shapes, ALLOCATIONS["pooled"].choose(curves, fixed), strict=True)
    }


def main() -> None:
    """Collect, evaluate, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="offline")
    parser.add_argument("--calibration", default="offline")
    parser.add_argument("--text", default="sciq-validation", help="the first test text; BoolQ validation is the second")
    parser.add_argument("--windows", type=int, default=24)
    options = parser.parse_args()
    quiet_libraries()
    RESULTS.mkdir(parents=True, exist_ok=True)
    collect(options)
    directory = offline_model() if options.model == "offline" else Path(options.model)
    dtype, _ = evaluation_dtype()
    subject = Subject(directory, dtype, False)
    texts = [load_text(name) for name in (options.text, "boolq-validation")]

    def measured() -> list[tuple[float, float]]:
        found = [perplexity(subject.model, subject.tokenizer, text, 1024, options.windows) for text in texts]
        return [(item.perplexity, item.nats_per_token) for item in found]

    before = measured()
    files = sorted(RESULTS.glob("*.safetensors"), key=lambda path: int(path.stem))
    parameters = dict(subject.model.named_parameters())
    line(["quantizer", "bits", "correction", "rank", "bits per weight", "predicted", *("ppl", "excess") * 2])
    line(["---"] * 10)
    line(["dense", 16, "", "", "16", 0, *(cell for value, _ in before for cell in (f"{value:.4g}", 0))])
    for row in rows():
        name, bits, correction, kind = row
        cache = RESULTS / f"{'-'.join(map(str, row)).replace(' ', '_')}.json"
        if not cache.exists():
            losses: dict[str, torch.Tensor] = {}
            shapes: dict[str, tuple[int, int]] = {}
            for path in files:
                with safe_open(path, "pt") as file:
                    for key in file.keys():  # noqa: SIM118
                        if key.endswith(f"|{name}|{bits}|{correction}|loss"):
                            losses[key.split("|")[0]] = file.get_tensor(key)
                        elif key.endswith(f"|{name}|{bits}|weight"):
                            d_out, d_in = file.get_slice(key).get_shape()
                            shapes[key.split("|")[0]] = d_out, d_in
            ranks = ranks_of(row, losses, shapes)
            for path in files:
                with safe_open(path, "pt") as file:
                    held = set(file.keys())
                    for linear in (key for key in shapes if f"{key}|{name}|{bits}|weight" in held):
                        prefix, rank = f"{linear}|{name}|{bits}", ranks[linear]
                        weight = file.get_tensor(f"{prefix}|weight").float()
                        if rank:
                            a, b = (file.get_tensor(f"{prefix}|{correction}|{side}").float() for side in "ab")
                            weight = weight + a[:, :rank] @ b[:rank]
                        parameters[f"{linear}.weight"].data.copy_(weight)
            grid = Grid(bits, GROUP)
            size = sum(Spec("packed", ranks[key], grid).nbytes(*shape, 2) for key, shape in shapes.items())
            weights = sum(d_out * d_in for d_out, d_in in shapes.values())
            cells = [f"{8 * size / weights:.2f}", f"{sum(float(losses[key][ranks[key]]) for key in shapes):.4f}"]
            for (value, nats), (_, dense_nats) in zip(measured(), before, strict=True):
                cells += [f"{value:.4g}", f"{nats - dense_nats:.3f}"]
            cache.write_text(json.dumps(cells))
        line([name, bits, correction, kind, *json.loads(cache.read_text())])


if __name__ == "__main__":
    main()
