"""Tiny models of every contract architecture, built from their configs, with a tiny tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 272
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 96}
EXPERTS = {"num_experts_per_tok": 2}
WINDOWED = {**GROUPED, "head_dim": 12, "sliding_window": 16}

# name -> (config class, its arguments); each stands for a shape of its own: see the comment
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", GROUPED),  # biased q, k, v
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),  # heads wider than the hidden size
    "gemma2": ("Gemma2Config", {**WINDOWED, "query_pre_attn_scalar": 12}),  # masks differ by layer, softcaps
    "gemma3": ("Gemma3TextConfig", {**WINDOWED, "query_pre_attn_scalar": 12}),  # rotary embeddings differ by layer
    "phi3": ("Phi3Config", GROUPED),  # fused qkv and gate_up
    "gpt2": ("GPT2Config", {**{k: v for k, v in COMMON.items() if k != "hidden_size"}, "n_embd": 48}),  # Conv1D
    "opt": ("OPTConfig", {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 48}),  # biases, positions with an offset
    "gpt_neox": ("GPTNeoXConfig", {**COMMON, "intermediate_size": 96}),  # parallel residual
    "falcon": ("FalconConfig", {**COMMON, "new_decoder_architecture": False, "multi_query": True}),  # tuple outputs
    "mixtral": (
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),  # experts, stored one by one
    # experts in some layers only
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**GROUPED, **EXPERTS, "num_experts": 6, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    ),
    # latent attention; shared experts beside the routed ones
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **{**GROUPED, "num_key_value_heads": 4, "first_k_dense_replace": 1},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
            **{"moe_intermediate_size": 32, "q_lora_rank": 24, "kv_lora_rank": 16},
            **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
        },
    ),
    # experts stored as one stack, turned, with biases; attention sinks
    "gpt_oss": ("GptOssConfig", {**WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4TextConfig",
        {**GROUPED, "head_dim": 12, "intermediate_size_mlp": 96, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    # without the per-layer inputs and shared keys of the small ones, which are refused
    "gemma4": (
        "Gemma4TextConfig",
        {
            **{**WINDOWED, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
            **{"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "global_head_dim": 16},
            **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        },
    ),
}
MIXTURES = (
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "llama4",
    "gemma4",
)  # routers stay dense, and llama4's experts
CONTRACT = [name for name in ARCHITECTURES if name not in MIXTURES]


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: one token a byte, whichever class transformers loads it into."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{symbol: 3 + i for i, symbol in enumerate(symbols)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(directory)


def write_text(path: Path, characters: int, seed: int = 0) -> Path:
    """A text of so many letters and spaces (a token each), of a skewed distribution, in lines."""
    generator = torch.Generator().manual_seed(seed)
    letters = "\n etaoinshrdlucmfwypvbgkjqxz"
    drawn = (torch.rand(characters, generator=generator) ** 3 * len(letters)).long().tolist()
    path.write_text("".join(letters[i] for i in drawn), encoding="utf-8")
    return path


def write_model(
    directory: Path, name: str = "llama", dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **changes: Any
) -> Path:
    """A tiny checkpoint of architecture ``name`` with weights large enough for its layers to matter."""
    config_class, arguments = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**{**arguments, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            elif parameter_name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    write_tokenizer(directory)
    return directory


def content(directory: Path) -> dict[str, str]:
    """Hashes of the files that make a checkpoint."""
    named = ("config.json", "adapter_config.json")
    files = [path for path in directory.iterdir() if path.suffix in (".safetensors", ".py") or path.name in named]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
