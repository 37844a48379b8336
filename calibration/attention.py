"""Causal attention by batched products, for processors that multiply bfloat16 natively.

torch's own kernel for these processors takes two fifths of a small model's forward and backward passes. Here the rows of
a window go in blocks: each sees the keys up to its end, so that three eighths of the scores or more are never made, and the heads
that share keys (grouped queries) are one product's rows. Scores and probabilities are bfloat16; sums and the softmax's
arithmetic are float32. Whatever is not plain causal attention of whole windows (masks, sliding windows, short windows) goes to
torch's kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "layerpress"
BLOCKS = 8  # of a window's rows; the more, the fewer scores are made in vain
BLOCKS_BACKWARD = 4  # where autograd is to come back: every block costs there as much again
SHORTEST = 256  # tokens of a window that is cut into blocks


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: ``query`` ``(windows, heads, length, size)``, keys and values of as many heads or fewer.

    Returns ``(windows, length, heads, size)``.
    """
    length, causal = query.shape[2], getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = causal and attention_mask is None and not dropout and key.shape[2] == length and not _extras(more)
    suits = query.dtype == torch.bfloat16 and query.device.type == "cpu" and length >= SHORTEST and not length % BLOCKS
    if not (plain and suits):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
        )
    return causal_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def _extras(more: dict[str, Any]) -> bool:
    """Whether something is asked for that torch's kernel, or transformers around it, knows of."""
    return any(more.get(name) is not None for name in ("position_bias", "softcap", "cache", "s_aux"))


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """``softmax(scaling * Q K^T) V`` with every row seeing itself and what is before it; ``(windows, length, heads, size)``."""
    windows, heads, length, size = query.shape
    shared = key.shape[1]
    rows = query.reshape(windows * shared, heads // shared, length, size)
    # of keys there are fewer than of queries
    keys, values = (key * scaling).reshape(windows * shared, length, size).transpose(1, 2), value.flatten(0, 1)
    backward = torch.is_grad_enabled()
    step = length // (BLOCKS_BACKWARD if backward else BLOCKS)
    # added: filling by a mask takes several times as long, and again going backward
    later = torch.full((step, step), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    found = []
    for first in range(0, length, step):
        last = first + step
        scores = torch.bmm(rows[:, :, first:last].flatten(1, 2), keys[:, :, :last])
        scores.view(len(scores), -1, step, last)[..., first:].add_(later)
        probabilities = scores.softmax(-1) if backward else torch.softmax(scores, -1, out=scores)
        mixed = torch.bmm(probabilities, values[:, :last])
        found.append(mixed.view(windows, heads, step, -1).transpose(1, 2))
    return torch.cat(found, dim=1)


def use(model: Any) -> None:
    """Let a model whose attention is torch's kernel run this one where it suits."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
