"""How fast a compressed checkpoint decodes, and in how much memory, with its integers unpacked and kept packed; prints a table.

    python benchmarks/inference.py OUTPUT [--dense SOURCE]

Each row is a process of its own: one sequence, greedy, 64 tokens after a prompt of 128, the median of three; and a batch of 4 x 512
tokens at once. Memory is what the process holds beyond one that has only imported the libraries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROMPT, DECODED, BATCH, REPEATS = 128, 64, (4, 512), 3


def measure(directory: str, runtime: str) -> dict[str, float]:
    """Tokens per second decoding and in a batch, and bytes of memory, of one checkpoint; ``runtime`` is empty for a dense one."""
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    from eval.quiet import quiet_libraries

    quiet_libraries()
    process = psutil.Process()
    before = process.memory_info().rss
    how: dict[str, Any] = {"trust_remote_code": True, "runtime": runtime} if runtime else {}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **how).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    many = torch.randint(0, model.config.vocab_size, BATCH, generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {"decoding": [], "batch": []}
    with torch.inference_mode():
        for repeat in range(REPEATS + 1):
            seen = model(ids)
            token, cache = seen.logits[:, -1:].argmax(-1), seen.past_key_values
            started = time.perf_counter()
            for _ in range(DECODED):
                seen = model(token, past_key_values=cache)
                token, cache = seen.logits[:, -1:].argmax(-1), seen.past_key_values
            decoded = time.perf_counter()
            model(many, logits_to_keep=1)
            if repeat:  # the first unpacks, or packs for the kernel
                seconds["decoding"].append(decoded - started)
                seconds["batch"].append(time.perf_counter() - decoded)
    return {
        "decoding": DECODED / statistics.median(seconds["decoding"]),
        "batch": many.numel() / statistics.median(seconds["batch"]),
        "memory": process.memory_info().rss - before,
    }


def main() -> None:
    """A row for the source, if it is given, and for each runtime."""
    from tables import line

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("--dense", help="the source, for comparison")
    parser.add_argument("--row", nargs=2, metavar=("DIR", "RUNTIME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(*options.row)))
        return
    line(["", "tokens/s decoding", "tokens/s in a batch", "memory MB"])
    line(["---"] * 4)
    rows = [("dense source", options.dense, "")] if options.dense else []
    rows += [("unpacked", options.output, "dense"), ("packed", options.output, "packed")]
    for name, directory, runtime in rows:
        command = [sys.executable, __file__, options.output, "--row", directory, runtime]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        line([name, f"{found['decoding']:.1f}", f"{found['batch']:.0f}", f"{found['memory'] / 1e6:.0f}"])


if __name__ == "__main__":
    main()
