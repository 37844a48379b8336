"""Writes a llama-shaped checkpoint of random weights, tensor by tensor, with a byte-level tokenizer.

python benchmarks/synthetic.py OUT --hidden 1536 --layers 40 --intermediate 4096 --heads 12 --kv-heads 4 --vocabulary 8192
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def write(
    directory: Path, hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int
) -> int:
    """Write the checkpoint in bfloat16; returns its bytes of tensors."""
    from accelerate import init_empty_weights
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from checkpoint.sink import Entry, ShardWriter

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    directory.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    with init_empty_weights():
        state = LlamaForCausalLM(config).state_dict()
    entries = [Entry(name, torch.bfloat16, tuple(value.shape)) for name, value in state.items()]
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[torch.Tensor]:
        for entry in entries:
            if len(entry.shape) == 1:
                yield torch.ones(entry.shape, dtype=torch.bfloat16)
                continue
            # a spectrum that falls, as trained weights have: random rows scaled channel by channel
            scale = torch.logspace(0.3, -0.7, entry.shape[1]) / entry.shape[1] ** 0.5
            yield (torch.randn(entry.shape, generator=generator) * scale).bfloat16()

    total = ShardWriter(directory, entries).write(tensors())
    symbols = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(symbols, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    for name in ("hidden", "layers", "intermediate", "heads", "kv-heads", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = vars(parser.parse_args())
    print(f"{write(**options) / 1e9:.2f} GB in {options['directory']}")


if __name__ == "__main__":
    main()
