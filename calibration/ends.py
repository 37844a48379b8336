"""What the loss makes of changed weights in the embedding and in the head: measured on the calibration windows, in nats per token.

Neither is a linear of a layer. In the head another weight changes the logits and nothing else, so KL(dense || changed) itself is
measured; in the embedding it changes the first layer's input, where the streamed backward pass has left the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from calibration.gram import across, add_gram
from calibration.labels import logit_tokens
from calibration.structure import Linear
from calibration.sweep import Sweep
from checkpoint import processes

HEAD_TOKENS = 4096  # on which the head is run once a candidate
END_ROWS = 8192  # of an embedding or a head that are rounded at a time


def _last_outputs(sweep: Sweep) -> Iterator[torch.Tensor]:
    """Outputs ``(1, tokens, width)`` of the last layer, ``HEAD_TOKENS`` in all, as many at a time as their logits allow."""
    chunk = logit_tokens(sweep.source.config.get_text_config().vocab_size)
    windows = max(1, min(HEAD_TOKENS // sweep.ids.shape[1], sweep.backward))
    for hidden in sweep.inputs(len(sweep.structure.layers), windows):
        for window in hidden:  # a chunk is never longer than a window: there may be no positions for more
            yield from window[None].split(chunk, dim=1)


@torch.no_grad()
def head_moment(sweep: Sweep) -> tuple[torch.Tensor, float]:
    """``E[h h^T]`` of the head's inputs ``(width, width)``, and ``E[1 - sum p^2]``: how much of a row's change reaches the loss."""
    module = sweep.source.model.get_output_embeddings()
    total = torch.zeros(module.weight.shape[1], module.weight.shape[1], device=sweep.source.device)
    doubt, tokens = 0.0, 0.0
    handle = module.register_forward_pre_hook(lambda _, args: add_gram(total, args[0].flatten(0, -2)))
    try:
        with sweep.source.loaded(sweep.structure.back):
            for hidden in _last_outputs(sweep):
                probabilities = sweep.replay.head(hidden)[0].float().softmax(-1)
                doubt += float((1 - probabilities.square().sum(-1)).sum())
                tokens += len(probabilities)
    finally:
        handle.remove()
    processes.add_up([total])
    doubt, tokens = processes.added_up([doubt, tokens])
    return across(total) / tokens, doubt / tokens


@torch.no_grad()
def head_divergence(sweep: Sweep, weights: Mapping[str, torch.Tensor]) -> float:
    """KL(dense || changed) with other weights, by parameter name, in the head alone."""
    total, tokens = 0.0, 0.0
    with sweep.source.loaded(sweep.structure.back):
        for hidden in _last_outputs(sweep):
            dense = sweep.replay.head(hidden)[0].float().log_softmax(-1)
            with sweep.source.substituted(weights):
                changed = sweep.replay.head(hidden)[0].float().log_softmax(-1)
            total += float((dense.exp() * (dense - changed)).sum())
            tokens += len(dense)
    total, tokens = processes.added_up([total, tokens])
    return total / tokens


def embedding_moment(sweep: Sweep) -> torch.Tensor:
    """``E[g g^T]`` of the loss gradient at the first layer's input ``(width, width)``."""
    total, tokens = torch.empty(0), 0.0
    for gradient in sweep.gradients(0):
        rows = gradient.flatten(0, 1)
        total = total if tokens else rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float32)
        add_gram(total, rows)
        tokens += len(rows)
    processes.add_up([total])
    (tokens,) = processes.added_up([tokens])
    return across(total) / tokens


@torch.no_grad()
def embedding_loss(sweep: Sweep, weights: Mapping[str, torch.Tensor]) -> float:
    """``1/2 E[(g^T d)^2]`` with d the change of the first layer's input, to second order."""
    total, first = 0.0, 0
    with sweep.source.loaded(sweep.structure.front), sweep.source.substituted(weights):
        for gradient, before in zip(sweep.gradients(0), sweep.inputs(0, sweep.backward), strict=True):
            after = sweep.replay.embed(sweep.ids[first : first + len(gradient)])
            total += float((gradient.float() * (after.float() - before.float())).sum(-1).square().sum())
            first += len(gradient)
    total, seen = processes.added_up([total, first * sweep.ids.shape[1]])
    return total / seen / 2


def roles_of(sweep: Sweep, end: Linear) -> tuple[bool, bool]:
    """Whether a weight is the embedding's, and whether it is the head's; a tied one is both."""
    return end.role == "embedding", end.role == "head" or f"{end.name}.weight" in sweep.source.tied.values()
