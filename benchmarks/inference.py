"""How fast compressed models read a prompt and decode, beside the dense one; prints tables.

    python benchmarks/inference.py --layer                   # one decoder layer of the 8B shape, random weights, in memory
    python benchmarks/inference.py --model                   # SmolLM2 (offline package) and what run_pipeline.py makes of it
    python benchmarks/inference.py --model DIR --outputs OUT [OUT ...]

Without flags, both. All variants of a table are in one process and take turns, round by round; a ratio is the median over the
rounds of the dense time of that round over the variant's. bfloat16; greedy, with a cache. Memory is what a process of its own
holds beyond one that has only imported the libraries. Outputs not named are made once, in benchmarks/results/inference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tables import compression, line  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "inference"
PROMPT, BATCH, DECODED, ROUNDS = 512, 4, 16, 5
TIMES = (f"prefill 1 x {PROMPT}", f"prefill {BATCH} x {PROMPT}", f"decode after {PROMPT}")
SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    },
}
# outputs: name -> recipe, ratio of the decoder, further flags; loss-aware stores products pivoted unless told otherwise
OUTPUTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    **{f"factored-{ratio}": ("loss-aware", ratio, ("--form", "factors")) for ratio in ("0.8", "0.6", "0.5")},
    "pivoted-0.5": ("loss-aware", "0.5", ()),
    "packed-0.266": ("gptq", "0.266", ("--runtime", "packed")),
}


def factored(ratio: float) -> Callable[[int, int], dict[str, Any]]:
    """The spec of factors that have ``ratio`` of the numbers of a weight ``(d_out, d_in)``."""
    return lambda d_out, d_in: {"form": "factors", "rank": int(ratio * d_out * d_in / (d_out + d_in))}


def pivoted(ratio: float) -> Callable[[int, int], dict[str, Any]]:
    """The same for a pivoted product: ``r (d_out + d_in - r)`` numbers."""

    def spec(d_out: int, d_in: int) -> dict[str, Any]:
        both = d_out + d_in
        return {"form": "pivoted", "rank": int((both - math.sqrt(both**2 - 4 * ratio * d_out * d_in)) / 2)}

    return spec


def packed(d_out: int, d_in: int) -> dict[str, Any]:
    """The spec of 4 bits in groups of 128."""
    grid = {"bits": 4, "group_size": 128, "symmetric": True, "power_of_two": False}
    return {"form": "packed", "rank": 0, "weight": grid}


def one_layer(shape: str, spec: Callable[[int, int], dict[str, Any]] | None, runtime: str = "dense") -> Any:
    """A causal model of one decoder layer and a vocabulary of 256, of random weights; every linear as ``spec`` says."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from checkpoint.modeling_template import choose_runtime, factorise

    config = LlamaConfig(**SHAPES[shape], num_hidden_layers=1, vocab_size=256, dtype="bfloat16")
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
        linears = {name: item for name, item in model.model.named_modules() if isinstance(item, torch.nn.Linear)}
        if spec:
            factorise(model.model, {name: spec(*item.weight.shape) for name, item in linears.items()})
    config.runtime = runtime
    choose_runtime(model, config)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("weight_packed"):
            tensor.random_(generator=generator)
        elif name.endswith("order"):
            tensor.copy_(torch.randperm(len(tensor), generator=generator))
        elif name.endswith("weight_scale"):
            tensor.fill_(0.2 / tensor.shape[1] ** 0.5 / 128**0.5)
        elif tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, tensor.shape[1] ** -0.5, generator=generator)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are in no state dict
    return model.eval()


def times(model: Any) -> tuple[float, float, float]:
    """Seconds of one round, as in TIMES."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (BATCH, PROMPT), generator=generator)
    with torch.inference_mode():
        started = time.perf_counter()
        seen = model(ids[:1], logits_to_keep=1)
        prefilled = time.perf_counter()
        for _ in range(DECODED):
            seen = model(seen.logits[:, -1:].argmax(-1), past_key_values=seen.past_key_values)
        decoded = time.perf_counter()
        model(ids, logits_to_keep=1)
        return prefilled - started, time.perf_counter() - decoded, decoded - prefilled


def compare(models: dict[str, Any], more: dict[str, list[str]]) -> None:
    """A table of all variants, the first being the dense one; ``more`` has further columns: title to cells."""
    rounds: list[list[tuple[float, float, float]]] = []
    for number in range(ROUNDS + 1):
        taken = [times(model) for model in models.values()]
        if number:  # the first unpacks, or packs for the kernel
            rounds.append(taken)
    line(["", *(cell for name in TIMES for cell in (f"{name}: tokens/s", "x dense")), *more])
    line(["---"] * (1 + 2 * len(TIMES) + len(more)))
    for row, name in enumerate(models):
        cells = [name]
        for column, tokens in enumerate((PROMPT, BATCH * PROMPT, DECODED)):
            seconds = statistics.median(taken[row][column] for taken in rounds)
            ratio = statistics.median(taken[0][column] / taken[row][column] for taken in rounds)
            cells += [f"{tokens / seconds:.1f}", f"{ratio:.2f}"]
        line([*cells, *(column[row] for column in more.values())])


def layer(shape: str) -> None:
    """The table of one decoder layer."""
    variants = {
        "dense": one_layer(shape, None),
        **{f"factored, {ratio}": one_layer(shape, factored(ratio)) for ratio in (0.8, 0.6, 0.5)},
        "pivoted, 0.5": one_layer(shape, pivoted(0.5)),
        "4 bits, packed": one_layer(shape, packed, "packed"),
        "4 bits, unpacked at first use": one_layer(shape, packed),
    }
    held = [sum(item.nbytes for item in model.model.layers.state_dict().values()) for model in variants.values()]
    print(f"\none decoder layer of {shape}, every linear in one form\n", flush=True)
    compare(variants, {"MB stored": [f"{size / 1e6:.0f}" for size in held]})


def load(directory: str, runtime: str) -> Any:
    """A checkpoint in bfloat16; ``runtime`` is empty for one that has no packed weights."""
    import torch
    from transformers import AutoModelForCausalLM

    how = {"runtime": runtime} if runtime else {}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, trust_remote_code=True, **how).eval()


def memory(directory: str, runtime: str) -> int:
    """Bytes that this process holds more once it has loaded a checkpoint and run one round."""
    import psutil
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    process = psutil.Process()
    before = process.memory_info().rss
    model = load(directory, runtime)
    times(model)
    return process.memory_info().rss - before


def produced(model: Path) -> list[Path]:
    """The outputs of OUTPUTS, made where they are missing."""
    for name, (recipe, ratio, more) in OUTPUTS.items():
        if not (RESULTS / name).exists():
            print(f"making {name}", flush=True)
            work = RESULTS / f"{name.partition('-')[0]}.work"  # ratios are slices of one work
            command = compression(model, recipe, ratio, "decoder", 4096, RESULTS / name, *more, "--work-dir", str(work))
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return [RESULTS / name for name in OUTPUTS]


def whole(model: Path, outputs: list[Path]) -> None:
    """The table of whole models; one with packed weights is in it twice."""
    rows = {"dense": (str(model), "")}
    for output in outputs:
        linears = json.loads((output / "config.json").read_text())["layerpress"]["linears"]
        if any(item["form"] == "packed" for item in linears.values()):
            rows[f"{output.name}, stays packed"] = (str(output), "packed")
            rows[f"{output.name}, unpacked at first use"] = (str(output), "dense")
        else:
            rows[output.name] = (str(output), "")
    held = []
    for row in rows.values():
        command = [sys.executable, __file__, "--memory", *row]
        done = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        held.append(f"{int(done.stdout) / 1e6:.0f}")
    # oneDNN compiles a kernel for every shape and keeps 1024: pooled ranks are some 300 shapes a model and number of rows,
    # and the models of this process would push out one another's; it reads this when it is first used
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16384"
    print(f"\n{model.name}\n", flush=True)
    compare({name: load(*row) for name, row in rows.items()}, {"memory MB": held})


def processor() -> str:
    """The CPU's name."""
    listed = Path("/proc/cpuinfo")
    names = [row for row in listed.read_text().splitlines() if row.startswith("model name")] if listed.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor()


def main() -> None:
    """The parts that are asked for."""
    from eval.quiet import quiet_libraries

    quiet_libraries()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layer", nargs="?", const="llama-3-8b", choices=SHAPES)
    parser.add_argument("--model", nargs="?", const="offline", metavar="DIR")
    parser.add_argument("--outputs", nargs="+", type=Path, metavar="OUT")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(memory(*options.memory))
        return

    import torch
    from transformers import __version__

    from compress.pipeline import offline_model

    every = options.layer is None and options.model is None
    print(f"{torch.get_num_threads()} threads of {processor()}; torch {torch.__version__}, transformers {__version__}")
    print(f"bfloat16, medians of {ROUNDS} rounds, {DECODED} tokens decoded in each")
    if options.layer or every:
        layer(options.layer or "llama-3-8b")
    if options.model or every:
        model = Path(options.model) if options.model not in (None, "offline") else offline_model()
        whole(model, options.outputs or produced(model))


if __name__ == "__main__":
    main()
