"""The loss gradient at the logits, and from there at the last layer's output, in token chunks.

What moment it has is what matters, ``E[g g^T]``. ``rademacher`` and ``sampled`` make it the Fisher information, whose part at the
logits is ``F = diag(p) - p p^T``: as random signs through a root of F, or as ``p - onehot(y)`` of a label y drawn from the model.
Both are right on average. But where the model is sure, a label's gradient is next to nothing almost always and enormous once in a
while; that of signs is of nearly the same size every time, and half the tokens tell as much. ``empirical``: ``p - onehot`` of the text's
own next tokens. The loss is the *sum* over the sequence's positions (DESIGN section 4): what positions contribute is independent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# the gradient at the logits of positions first to last, in place of their probabilities (tokens, vocabulary) float32
AtLogits = Callable[[torch.Tensor, int, int], torch.Tensor]
LOGIT_BYTES = 32_000_000  # float32 logits in one chunk, at most: a vocabulary of 262k takes 30 tokens at a time
LOGIT_TOKENS = 80  # of which the logits of a vocabulary of 49k lie in the heap; larger blocks are new memory every time
# tokens whose logits go through the head together, in bfloat16, for each whose float32 would be as large; and those that are float32
# at a time: few enough for the processor's cache
HALVES, FLOAT_ROWS = 2, 16
NO_LABEL = -100
WORD, SIGN = 32, -(2**31)  # bits of a number, and the one of them that is the sign, of an integer and of a float
BLOCK = 256  # of a vocabulary, in which a label is looked for


def _generator(seed: int, window: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + window) % 2**63)


def random_bits(seed: int, window: int, length: int, vocabulary: int) -> torch.Tensor:
    """A bit for each position and each of the vocabulary: ``(length, ceil(vocabulary / 32))`` int32, by seed and window alone."""
    shape = (length, -(-vocabulary // WORD))
    return torch.randint(-(2**31), 2**31, shape, generator=_generator(seed, window), dtype=torch.int32)


def signs(bits: torch.Tensor) -> AtLogits:
    """``(I - p 1^T) diag(p)^1/2 z`` with ``z`` of random signs, ``bits`` of all positions: its moment is ``diag(p) - p p^T``."""

    def at_logits(probabilities: torch.Tensor, first: int, last: int) -> torch.Tensor:
        words = bits[first:last, :, None].to(probabilities.device)
        places = torch.arange(WORD, dtype=torch.int32, device=words.device)
        highest = (words << places).bitwise_and_(SIGN).flatten(1)[:, : probabilities.shape[1]]
        signed = probabilities.sqrt()
        signed.view(torch.int32).bitwise_xor_(highest)
        return torch.addcmul(signed, probabilities, signed.sum(-1, keepdim=True), value=-1, out=probabilities)

    return at_logits


def of_labels(labels: Callable[[torch.Tensor, int, int], torch.Tensor]) -> AtLogits:
    """``p - onehot`` of the ``labels`` of positions first to last, given their probabilities; nothing where there is no label."""

    def at_logits(probabilities: torch.Tensor, first: int, last: int) -> torch.Tensor:
        wanted = labels(probabilities, first, last)
        probabilities[torch.arange(len(wanted), device=wanted.device), wanted.clamp(min=0)] -= 1
        if (without := wanted == NO_LABEL).any():
            probabilities[without] = 0
        return probabilities

    return at_logits


def uniforms(seed: int, window: int, length: int) -> torch.Tensor:
    """Uniform numbers ``(length,)`` for a window's positions: a function of seed, window and position alone."""
    return torch.rand(length, generator=_generator(seed, window), dtype=torch.float64)


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
    at_logits: AtLogits,
    vocabulary: int,
) -> torch.Tensor:
    """Gradient ``(length, width)`` of the window's summed loss at the last layer's output ``hidden``.

    ``head`` maps ``(1, tokens, width)`` to logits; ``at_logits(probabilities, first, last)`` gives the gradient there for positions
    ``first`` to ``last``. Only a chunk of logits is held.
    """
    most = HALVES * logit_tokens(vocabulary)
    chunk = -(-hidden.shape[0] // -(-hidden.shape[0] // most))  # all alike: products of few rows are slow
    gradients = []
    for first in range(0, hidden.shape[0], chunk):
        part = hidden[first : first + chunk].detach().clone().requires_grad_(True)
        with torch.enable_grad():
            logits = head(part[None]).squeeze(0)
        above = torch.empty_like(logits)
        for row in range(0, len(part), FLOAT_ROWS):
            rows = slice(row, min(row + FLOAT_ROWS, len(part)))
            probabilities = logits.detach()[rows].to(torch.float32, copy=True)
            torch.softmax(probabilities, -1, out=probabilities)
            above[rows] = at_logits(probabilities, first + rows.start, first + rows.stop)
        gradients.append(torch.autograd.grad(logits, part, above)[0])
    return torch.cat(gradients)
