"""LoRAP's pruning of feed-forward channels (Li et al. 2024, arXiv 2404.09695, section 3.3): pure functions of weights and powers.

The score of intermediate channel i is the sum of the norms of what reads and writes it, each weight times its input's root
mean square: ``|| |gate_i| rms(x) || + || |up_i| rms(x) || + || |down_:i| rms(h_i) ||``. The least important 1 % of all channels
are kept (the paper's finding; ``least_kept``), and the next ones in order are pruned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def channel_scores(
    producers: Sequence[torch.Tensor], down: torch.Tensor, input_power: torch.Tensor, hidden_power: torch.Tensor
) -> torch.Tensor:
    """Scores ``(channels,)`` float64.

    ``producers`` are the weights ``(channels, d_in)`` that make the channels (gate and up, or up alone), ``down`` ``(d_out, channels)``
    reads them; ``input_power`` ``(d_in,)`` and ``hidden_power`` ``(channels,)`` are mean squares over tokens.
    """
    scores = torch.linalg.vector_norm(down.double(), dim=0) * hidden_power.double().sqrt()
    for weight in producers:
        scores = scores + torch.linalg.vector_norm(weight.double() * input_power.double().sqrt(), dim=1)
    return scores


def kept_channels(scores: torch.Tensor, keep: int, least_kept: float) -> torch.Tensor:
    """Indices, rising, of the ``keep`` channels that stay: the highest scores, and the lowest ``least_kept`` of all."""
    order = scores.argsort(stable=True)
    spared = min(int(least_kept * scores.numel()), keep)
    pruned = order[spared : spared + scores.numel() - keep]
    stays = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    stays[pruned] = False
    return stays.nonzero().squeeze(1)
