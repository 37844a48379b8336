"""Load a written checkpoint as a user would and compare what it computes: ``python -m checkpoint.check DIR``.

Run in a fresh process with stdin closed. The decoder stays on disk (accelerate's offloading, straight from the
safetensors), so that the check too holds one layer in memory. ``check.safetensors`` beside the directory
holds token ids and the logits that they must give.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from checkpoint.environment import end_loading, start_loading
from checkpoint.memory import keep_large_blocks_apart, peak_bytes

# relative to the largest logit; in bfloat16 the same products may be summed in another order
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def load_offloaded(
    directory: Path, dtype: torch.dtype, layers: str, trust_remote_code: bool, offload: str
) -> tuple[Any, dict[str, Any]]:
    """The model with its decoder layers on disk and the rest in memory, and transformers' loading report."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):  # transformers 5.23 gives wrong weights where these are offloaded
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    devices: dict[str, Any] = {}
    _place(skeleton, "", layers, devices)
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        device_map=devices,
        offload_folder=offload,
        offload_buffers=True,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )


def _place(module: torch.nn.Module, path: str, layers: str, devices: dict[str, Any]) -> None:
    """Every leaf outside the list of layers in memory, each layer on disk."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if child_path == layers:
            devices.update({f"{layers}.{index}": "disk" for index, _ in child.named_children()})
        elif layers.startswith(child_path + "."):
            _place(child, child_path, layers, devices)
        else:
            devices[child_path] = "cpu"


def check(directory: Path, expected: Path, layers: str, dtype: torch.dtype, trust_remote_code: bool) -> str | None:
    """None if the checkpoint loads whole and gives the expected logits and token ids, else what is wrong."""
    from transformers import AutoTokenizer

    record = load_file(expected)
    with tempfile.TemporaryDirectory() as offload:
        model, report = load_offloaded(directory, dtype, layers, trust_remote_code, offload)
        end_loading()
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[kind]:
                return f"{kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:3]}"
        with torch.no_grad():
            logits = model.eval()(input_ids=record["ids"], use_cache=False).logits.float()
    scale = record["logits"].float().abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # a model may say nothing
    difference = (logits - record["logits"].float()).abs().max() / scale
    if not bool(torch.isfinite(difference)) or float(difference) > TOLERANCE[dtype]:
        return f"its logits differ from those of the compressed layers by {float(difference):.2g} of the largest"
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    text = bytes(record["text"].tolist()).decode()
    if tokenizer(text, add_special_tokens=False)["input_ids"] != record["text_ids"].tolist():
        return "its tokenizer gives other ids than the source's"
    return None


def main(given: Sequence[str] | None = None) -> int:
    """Exit code 0 if the checkpoint is good; else 1 and one line of JSON saying why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--expected", type=Path, required=True)
    parser.add_argument("--layers", required=True, help="path of the list of decoder layers")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--trust-remote-code", action="store_true")
    arguments = parser.parse_args(given)
    keep_large_blocks_apart()
    problem = check(
        arguments.directory,
        arguments.expected,
        arguments.layers,
        getattr(torch, arguments.dtype),
        arguments.trust_remote_code,
    )
    print(json.dumps({"problem": problem, "peak_bytes": peak_bytes()}))
    return 1 if problem else 0


if __name__ == "__main__":
    start_loading()
    sys.exit(main())
