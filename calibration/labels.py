"""The labels whose loss is differentiated, and its gradient at the last layer's output, in token chunks.

``sampled``: drawn from the model itself, which makes ``E[g g^T]`` the true Fisher information; ``empirical``: the text's own
next tokens. The loss is the *sum* over the sequence's positions (DESIGN section 4).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# labels of positions first to last, given their probabilities (tokens, vocabulary)
Labels = Callable[[torch.Tensor, int, int], torch.Tensor]
LOGIT_BYTES = 32_000_000  # float32 logits in one chunk, at most: a vocabulary of 262k takes 30 tokens at a time
LOGIT_TOKENS = 80  # of which the logits of a vocabulary of 49k lie in the heap; larger blocks are new memory every time
# tokens whose logits go through the head together, in bfloat16, for each whose float32 would be as large; and those that are float32
# at a time: few enough for the processor's cache
HALVES, FLOAT_ROWS = 2, 16
NO_LABEL = -100
BLOCK = 256  # of a vocabulary, in which a label is looked for


def uniforms(seed: int, window: int, length: int) -> torch.Tensor:
    """Uniform numbers ``(length,)`` for a window's positions: a function of seed, window and position alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + window) % 2**63)
    return torch.rand(length, generator=generator, dtype=torch.float64)


def sample(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Labels ``(tokens,)`` drawn from ``probabilities`` ``(tokens, vocabulary)`` float32 by inverting the distribution.

    First among blocks of the vocabulary, then within the block: running sums over all of it take several times as long.
    """
    vocabulary = probabilities.shape[-1]
    whole = vocabulary // BLOCK * BLOCK
    parts = [
        probabilities[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).sum(-1),
        probabilities[:, whole:].sum(-1, keepdim=True),
    ]
    upto = torch.cat(parts, dim=1).cumsum(-1, dtype=torch.float64)
    threshold = uniform.to(upto.device)[:, None] * upto[:, -1:]
    block = torch.searchsorted(upto, threshold).clamp_(max=upto.shape[1] - 1)
    before = torch.cat([upto.new_zeros(len(upto), 1), upto], dim=1).gather(1, block)
    columns = (block * BLOCK + torch.arange(BLOCK, device=block.device)).clamp_(max=vocabulary - 1)
    within = probabilities.gather(1, columns).cumsum(-1, dtype=torch.float64)
    at = torch.searchsorted(within, threshold - before).clamp_(max=BLOCK - 1)
    return columns.gather(1, at).squeeze(1)


def next_tokens(ids: torch.Tensor) -> torch.Tensor:
    """Labels ``(length,)`` of a window of ids: the next token; the last position has none."""
    return torch.cat([ids[1:], ids.new_full((1,), NO_LABEL)])


def logit_tokens(vocabulary: int) -> int:
    """How many tokens' logits are held at a time."""
    return max(1, min(LOGIT_TOKENS, LOGIT_BYTES // (4 * vocabulary)))


def loss_gradient(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    labels: Labels,
    vocabulary: int,
) -> torch.Tensor:
    """Gradient ``(length, width)`` of the window's summed loss at the last layer's output ``hidden``.

    ``head`` maps ``(1, tokens, width)`` to logits; ``labels(probabilities, first, last)`` gives the labels of positions
    ``first`` to ``last``. The gradient at the logits is ``softmax - onehot``; only a chunk of logits is held.
    """
    most = HALVES * logit_tokens(vocabulary)
    chunk = -(-hidden.shape[0] // -(-hidden.shape[0] // most))  # all alike: products of few rows are slow
    gradients = []
    for first in range(0, hidden.shape[0], chunk):
        part = hidden[first : first + chunk].detach().clone().requires_grad_(True)
        with torch.enable_grad():
            logits = head(part[None]).squeeze(0)
        at_logits = torch.empty_like(logits)
        for row in range(0, len(part), FLOAT_ROWS):
            rows = slice(row, min(row + FLOAT_ROWS, len(part)))
            exact = logits.detach()[rows].to(torch.float32, copy=True)
            torch.softmax(exact, -1, out=exact)
            wanted = labels(exact, first + rows.start, first + rows.stop)
            exact[torch.arange(len(wanted), device=wanted.device), wanted.clamp(min=0)] -= 1
            if (without := wanted == NO_LABEL).any():
                exact[without] = 0
            at_logits[rows] = exact
        gradients.append(torch.autograd.grad(logits, part, at_logits)[0])
    return torch.cat(gradients)
