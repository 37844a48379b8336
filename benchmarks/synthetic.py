"""Writes a checkpoint of random weights, tensor by tensor, with a byte-level tokenizer: of any llama's sizes, or of a published shape.

    python benchmarks/synthetic.py OUT --hidden 1536 --layers 40 --intermediate 4096 --heads 12 --kv-heads 4 --vocabulary 8192
    python benchmarks/synthetic.py OUT --shape llama-3-8b [--layers 4] [--vocabulary 8192]

``--layers`` takes a slice of a shape's depth, ``--vocabulary`` other numbers of rows than its embedding and head have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = ("hidden", "layers", "intermediate", "heads", "kv_heads", "vocabulary")
PIECE = 1 << 24  # random numbers made in float32 at a time
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
LLAMA_3 = LLAMA | {"kv_heads": 8, "vocabulary": 128256, "positions": 8192, "rope_theta": 500000.0}
# the configurations as published; a field that is not a size of ours is the configuration's own
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA
    | {"hidden": 4096, "layers": 32, "intermediate": 11008, "heads": 32, "kv_heads": 32, "vocabulary": 32000}
    | {"positions": 4096, "rope_theta": 10000.0},
    "llama-3-8b": LLAMA_3 | {"hidden": 4096, "layers": 32, "intermediate": 14336, "heads": 32},
    "llama-3-70b": LLAMA_3 | {"hidden": 8192, "layers": 80, "intermediate": 28672, "heads": 64},
    "qwen3-14b": {"model_type": "qwen3", "rms_norm_eps": 1e-6, "head_dim": 128}
    | {"hidden": 5120, "layers": 40, "intermediate": 17408, "heads": 40, "kv_heads": 8, "vocabulary": 151936}
    | {"positions": 40960, "rope_theta": 1000000.0},
}


def write(directory: Path, **sizes: int) -> int:
    """Write a llama of these ``SIZES`` in bfloat16; returns its bytes of tensors."""
    return write_config(directory, _config(model_type="llama", **sizes))


def write_text(directory: Path) -> Path:
    """Write a text to calibrate such models on: random weights do not mind which."""
    text = directory / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and so on. \n" * 3000, encoding="utf-8")
    return text


def shape_config(shape: str, layers: int | None = None, vocabulary: int | None = None) -> Any:
    """The configuration of a published shape, with other numbers of layers and rows where given (KeyError for another name)."""
    changes = {"layers": layers, "vocabulary": vocabulary}
    return _config(**SHAPES[shape] | {name: value for name, value in changes.items() if value is not None})


def _config(
    *,
    model_type: str,
    hidden: int,
    layers: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    positions: int = 2048,
    rope_theta: float = 10000.0,
    **own: Any,
) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        model_type,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=False,
        dtype="bfloat16",
        **own,
    )


def meta_model(config: Any) -> Any:
    """The model of a configuration without memory for its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def write_config(directory: Path, config: Any) -> int:
    """Write a checkpoint of a configuration in bfloat16, one tensor in memory; returns its bytes of tensors."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from checkpoint.sink import Entry, ShardWriter

    model = meta_model(config)
    directory.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    entries = [Entry(name, torch.bfloat16, tuple(value.shape)) for name, value in model.state_dict().items()]
    total = ShardWriter(directory, entries).write(_weights(entry.shape for entry in entries))
    symbols = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(symbols, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return total


def _weights(shapes: Iterator[tuple[int, ...]]) -> Iterator[torch.Tensor]:
    """A tensor for every shape; matrices are filled some rows at a time: float32 of a whole embedding would be gigabytes."""
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) > 1:
            # a spectrum that falls, as trained weights have: random rows scaled channel by channel
            scale = torch.logspace(0.3, -0.7, shape[1]) / shape[1] ** 0.5
            for rows in tensor.split(max(1, PIECE // shape[1])):
                rows.copy_(torch.randn(rows.shape, generator=generator).mul_(scale))
        yield tensor


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES))
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    options = vars(parser.parse_args())
    directory, shape = options.pop("directory"), options.pop("shape")
    if shape:
        given = [name for name in SIZES if options[name] is not None and name not in ("layers", "vocabulary")]
        if given:
            parser.error(f"--shape says what {', '.join(given)} are; only --layers and --vocabulary may be others")
        size = write_config(directory, shape_config(shape, options["layers"], options["vocabulary"]))
    else:
        missing = [name for name in SIZES if options[name] is None]
        if missing:
            parser.error(f"without --shape every size is needed; missing: {', '.join(missing)}")
        size = write(directory, **options)
    print(f"{size / 1e9:.2f} GB in {directory}")


if __name__ == "__main__":
    main()
