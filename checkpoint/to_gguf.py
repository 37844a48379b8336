"""A stock checkpoint, as ``--export dense`` writes it, as one GGUF file for llama.cpp: ``python -m checkpoint.to_gguf DIR FILE.gguf``.

Weights keep their dtype (vectors become float32, which llama.cpp asks for), one at a time in memory. Names come from the
``gguf`` package. Architectures are in ``ARCHITECTURES``, splits of text in ``SPLITS``; whatever is not there is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from checkpoint.errors import UserError, told
from checkpoint.files import publish
from checkpoint.shards import StoredTensor, as_bytes, read_headers, read_tensors, shard_paths
from checkpoint.source import read_config

# transformers' model type -> llama.cpp's architecture, and the projections whose rotary halves it wants interleaved
ARCHITECTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("llama", ("q_proj", "k_proj")),
    "mistral": ("llama", ("q_proj", "k_proj")),
    "qwen2": ("qwen2", ()),
    "qwen3": ("qwen3", ()),
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
WHOLE_WORDS = {"llama-bpe"}  # where llama.cpp takes a word that is a token before it merges


def _pattern(digits: str) -> dict[str, Any]:
    words = rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pattern = f"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{words}"
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# llama.cpp's name for how a byte-level tokenizer splits text, and what tokenizer.json says then
SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [WORDS],
    "smollm": [{"type": "Digits", "individual_digits": True}, WORDS],
    "llama-bpe": [_pattern(r"\p{N}{1,3}"), BYTES],
    "qwen2": [_pattern(r"\p{N}"), BYTES],
}


def to_gguf(directory: Path, file: Path) -> None:
    """Write the stock checkpoint in ``directory`` to ``file``.

    Raises UserError for an architecture, a rotary scaling or a tokenizer that is not in the tables, and if ``file`` exists;
    OSError where it cannot be written: then nothing is left of it.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        _write(directory, file, partial)
        publish(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _write(directory: Path, file: Path, partial: Path) -> None:
    gguf = _gguf()
    config = read_config(directory, trust_remote_code=False)
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{directory} is {config.model_type}; as GGUF are written: {', '.join(ARCHITECTURES)} (llama.cpp's own converter knows more)"
        )
    if file.exists():
        raise UserError(f"{file} exists; name another file")
    architecture, interleaved = ARCHITECTURES[config.model_type]
    if not file.absolute().parent.is_dir():
        raise UserError(f"{file.parent} is no directory; make it, or name another file")
    writer = gguf.GGUFWriter(partial, architecture)
    _add_settings(writer, config, directory)
    _add_tokenizer(gguf, writer, config, directory)
    names = gguf.get_tensor_name_map(
        next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def placed(item: StoredTensor, tensor: torch.Tensor) -> torch.Tensor:
        projection = item.key.split(".")[-2]
        return interleave(tensor, heads[projection]) if projection in interleaved else tensor

    wanted = []
    for item in read_headers(shard_paths(directory)).values():
        if item.key.endswith("rotary_emb.inv_freq"):  # of old checkpoints: llama.cpp makes them itself
            continue
        name = names.get_name(item.key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(
                f"{directory}: GGUF has no name for tensor {item.key} of {architecture}; keep the checkpoint as it is"
            )
        wanted.append((name, item))
    extra = _frequency_factors(config, architecture)
    kinds = gguf.GGMLQuantizationType
    stored = {torch.bfloat16: kinds.BF16, torch.float16: kinds.F16, torch.float32: kinds.F32}

    def dtype_of(item: StoredTensor) -> torch.dtype:
        return item.dtype if len(item.shape) > 1 and item.dtype in stored else torch.float32

    for name, item in wanted:
        nbytes = torch.Size(item.shape).numel() * dtype_of(item).itemsize
        writer.add_tensor_info(name, item.shape, numpy.dtype("float32"), nbytes, raw_dtype=stored[dtype_of(item)])
    if extra is not None:
        writer.add_tensor_info("rope_freqs.weight", extra.shape, numpy.dtype("float32"), extra.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, item in wanted:
        ((_, tensor),) = read_tensors([item])
        whole = placed(item, tensor).to(dtype_of(item))
        writer.write_tensor_data(numpy.frombuffer(as_bytes(whole), dtype=numpy.uint8))
    if extra is not None:
        writer.write_tensor_data(extra)
    writer.close()


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as problem:
        raise UserError("GGUF needs the package gguf; pip install gguf") from problem
    return gguf


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows ``(heads * size, ...)`` with a head's rotary pairs side by side: transformers pairs row i with row i + size / 2."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_settings(writer: Any, config: Any, directory: Path) -> None:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(directory.resolve().name)
    # llama.cpp has no windows here: of a model with one this is what gives the same results
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _frequency_factors(config: Any, architecture: str) -> numpy.ndarray | None:
    """By what llama.cpp divides the rotary frequencies, as transformers scales them; None where it does not."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if (kind, architecture) != ("llama3", "llama"):
        raise UserError(
            f"rotary frequencies scaled as {kind} are not written as GGUF for {architecture}; llama.cpp's own converter knows more"
        )
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    pairs = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    return (config.rope_parameters["rope_theta"] ** -pairs / scaled).numpy()


def _add_tokenizer(gguf: Any, writer: Any, config: Any, directory: Path) -> None:
    from transformers import AutoTokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{directory} has no tokenizer.json; a GGUF file holds the tokenizer too")
    stored = json.loads(path.read_text(encoding="utf-8"))
    model, split = stored["model"], _split(stored)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (ValueError, OSError, KeyError, TypeError) as problem:
        raise UserError(f"no tokenizer could be loaded from {directory} ({told(problem)})") from problem
    whole = bool(model.get("ignore_merges"))
    if model.get("type") != "BPE" or split is None or whole != (split in WHOLE_WORDS):
        raise UserError(
            f"{path} is not a byte-level BPE tokenizer that splits text as {', '.join(SPLITS)}; llama.cpp's own converter knows more"
        )
    kinds = gguf.TokenType
    tokens = {index: (token, kinds.NORMAL) for token, index in model["vocab"].items()}
    for added in stored.get("added_tokens", []):
        tokens[added["id"]] = added["content"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    if max(tokens) >= config.vocab_size:
        raise UserError(
            f"{path} has more tokens than the {config.vocab_size} of config.json; the two files do not belong together"
        )
    # an embedding may have more rows than there are tokens
    every = [tokens.get(index, (f"[PAD{index}]", kinds.UNUSED)) for index in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([token for token, _ in every])
    writer.add_token_types([kind for _, kind in every])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    ids: list[tuple[Callable[[int], None], int | None]] = [
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ]
    for add, index in ids:
        if index is not None:
            add(index)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _split(stored: dict[str, Any]) -> str | None:
    """llama.cpp's name for how tokenizer.json splits text; None if it has none."""
    found = stored.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", []) if found.get("type") == "Sequence" else [found]
    if stored.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    for name, wanted in SPLITS.items():
        if len(steps) == len(wanted) and all(
            one.items() <= {"use_regex": True, **step}.items() for one, step in zip(wanted, steps, strict=True)
        ):
            return name
    return None


def main(given: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint.to_gguf", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="a stock checkpoint, such as --export dense writes")
    parser.add_argument("file", type=Path, help="the file to write")
    options = parser.parse_args(given)
    try:
        to_gguf(options.directory, options.file)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        print(
            f"error: {options.file} could not be written ({told(problem)}); free disk, or name another", file=sys.stderr
        )
        return 2
    print(f"written: {options.file} ({options.file.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
