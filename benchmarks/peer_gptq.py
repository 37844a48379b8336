"""What llm-compressor's GPTQ takes on the same model, text and tokens: seconds, processor seconds, peak memory. Prints one row.

    python -m venv PEER && PEER/bin/pip install llmcompressor
    PEER/bin/python benchmarks/peer_gptq.py --model DIR --calibration TEXT [--tokens 65536] [--threads 2]

In an environment of its own: llm-compressor asks for other versions than this project. Four bits in groups of 64, the head left
alone, on windows of 512 tokens from the beginning of TEXT; the model is loaded as it is stored, and saved, as a user would.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

LENGTH = 512


def main() -> None:
    """Compress once, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    started = time.monotonic()
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = Path(options.calibration).read_text(encoding="utf-8")[: 12 * options.tokens]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: options.tokens]
    windows = [ids[first : first + LENGTH] for first in range(0, len(ids) - LENGTH + 1, LENGTH)]
    data = Dataset.from_list([{"input_ids": window, "attention_mask": [1] * LENGTH} for window in windows])
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    # groups of 64: llm-compressor refuses its usual 128 where they do not divide a row, as in SmolLM2
    grid = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
    groups = QuantizationScheme(targets=["Linear"], weights=grid)
    recipe = GPTQModifier(config_groups={"group_0": groups}, ignore=["lm_head"])
    with tempfile.TemporaryDirectory() as output:
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            max_seq_length=LENGTH,
            num_calibration_samples=len(windows),
            output_dir=output,
        )
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    processor = sum(item.ru_utime + item.ru_stime for item in used)
    peak = max(item.ru_maxrss for item in used) / 1e3
    print("| peer | tokens | threads | wall s | CPU s | peak MB |\n|---|---|---|---|---|---|")
    print(
        f"| llmcompressor {version('llmcompressor')}, GPTQ 4 bits | {len(windows) * LENGTH} | {options.threads} "
        f"| {time.monotonic() - started:.1f} | {processor:.1f} | {peak:.0f} |"
    )


if __name__ == "__main__":
    main()
