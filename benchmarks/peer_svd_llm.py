"""What SVD-LLM's own code takes on the same model, text and tokens: seconds, processor seconds, peak memory. Prints one row.

    git clone https://github.com/AIoT-MLSys-Lab/SVD-LLM
    python -m venv PEER && PEER/bin/pip install -r SVD-LLM/requirements.txt
    PEER/bin/python benchmarks/peer_svd_llm.py --code SVD-LLM --model DIR --calibration TEXT [--ratios 0.8 0.6] [--dtype bfloat16]

In an environment of its own: SVD-LLM asks for transformers 4.35.2. Its first step (whitening, "low resource") on windows of 512
tokens from the beginning of TEXT; its statistics and every ratio's model are saved, as its own command does. That command loads
the model in float16, which processors are slow at: ``--dtype`` gives another. What is saved does not run where keys have
fewer heads than queries (its attention has no place for that); what it takes to make it is what is measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH = 512


def older_tokenizer(model: Path) -> Any:
    """The model's tokenizer as transformers 4.35 reads it: with every merge in one string, not in two."""
    from transformers import PreTrainedTokenizerFast

    found = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    found["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in found["model"]["merges"]
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(found, file)
        file.flush()
        return PreTrainedTokenizerFast(tokenizer_file=file.name)


def main() -> None:
    """Compress once at every ratio, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--code", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8])
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    started = time.monotonic()
    sys.path.insert(0, options.code)
    import torch
    import transformers
    from SVDLLM import profle_svdllm_low_resource, whitening

    torch.set_num_threads(options.threads)
    tokenizer = older_tokenizer(Path(options.model))
    text = Path(options.calibration).read_text(encoding="utf-8")[: 12 * options.tokens]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: options.tokens])
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, 1, LENGTH)
    data = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]

    def load() -> torch.nn.Module:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options.model, torch_dtype=getattr(torch, options.dtype)
        )
        model.seqlen = LENGTH
        return model.eval()

    with tempfile.TemporaryDirectory() as output:
        model = load()
        statistics = profle_svdllm_low_resource("llama", model, data, "cpu")
        torch.save(statistics, f"{output}/statistics.pt")
        for index, ratio in enumerate(options.ratios):
            model = load() if index else model
            whitening("llama", model, statistics, ratio, "cpu")
            torch.save({"model": model, "tokenizer": tokenizer}, f"{output}/{ratio}.pt")
    used = resource.getrusage(resource.RUSAGE_SELF)
    ratios = " ".join(map(str, options.ratios))
    print("| peer | dtype | ratios | tokens | threads | wall s | CPU s | peak MB |\n|---|---|---|---|---|---|---|---|")
    print(
        f"| SVD-LLM, torch {torch.__version__} | {options.dtype} | {ratios} | {windows.numel()} | {options.threads} "
        f"| {time.monotonic() - started:.1f} | {used.ru_utime + used.ru_stime:.1f} | {used.ru_maxrss / 1e3:.0f} |"
    )


if __name__ == "__main__":
    main()
