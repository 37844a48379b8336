"""Perplexity of a text, and the divergence between two models on it, one window in memory at a time.

The protocol: the text is tokenised as one stream, without special tokens (no beginning-of-sequence token
anywhere), and cut into windows that do not overlap (stride = window); an incomplete last window is dropped.
A window of n tokens predicts n - 1. Losses are summed from float32 logits, whatever type the model runs in.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint import processes
from checkpoint.errors import UserError
from checkpoint.progress import Stage
from eval.results import DivergenceResult, PerplexityResult
from eval.texts import Text

# Rows of logits turned to float32 at once: 128 rows of a 256k vocabulary are 134 MB.
_ROWS = 128


def token_windows(tokenizer: PreTrainedTokenizerBase, text: Text, window: int, max_windows: int | None) -> torch.Tensor:
    """The text's first windows as ids ``(windows, window)``; UserError where it does not fill one."""
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    available = len(ids) // window
    count = available if max_windows is None else min(available, max_windows)
    if count < 1:
        raise UserError(f"the text {text.name} has {len(ids)} tokens, a window {window}: give a longer text")
    return torch.tensor(ids[: count * window]).view(count, window)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    window: int = 1024,
    max_windows: int | None = None,
) -> PerplexityResult:
    """The model's perplexity on the text. UserError where the text is too short or the loss is not finite."""
    windows = token_windows(tokenizer, text, window, max_windows)
    forward, nats = _Forward(model), 0.0
    with Stage(Path(text.name).name, len(windows), "windows") as stage:
        for ids in _own(windows):
            nats += _loss(forward.logits(ids), ids)
            stage.step(processes.count())
    (nats,) = processes.added_up([nats])
    return _result(text, windows, nats, forward.seconds)


@torch.no_grad()
def divergence(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    window: int = 1024,
    max_windows: int | None = None,
) -> tuple[PerplexityResult, PerplexityResult, DivergenceResult]:
    """Both models' perplexities (dense, compressed) and KL(dense || compressed), from one forward of each."""
    windows = token_windows(tokenizer, text, window, max_windows)
    of_dense, of_compressed = _Forward(dense), _Forward(compressed)
    dense_nats = compressed_nats = kl_nats = 0.0
    with Stage(Path(text.name).name, len(windows), "windows") as stage:
        for ids in _own(windows):
            dense_logits, compressed_logits = of_dense.logits(ids), of_compressed.logits(ids)
            if dense_logits.shape != compressed_logits.shape:
                sizes = f"{dense_logits.shape[-1]} and {compressed_logits.shape[-1]} tokens"
                raise UserError(f"the models have vocabularies of {sizes}: compare models of one vocabulary")
            dense_nats += _loss(dense_logits, ids)
            compressed_nats += _loss(compressed_logits, ids)
            kl_nats += _kl(dense_logits, compressed_logits)
            stage.step(processes.count())
    dense_nats, compressed_nats, kl_nats = processes.added_up([dense_nats, compressed_nats, kl_nats])
    before = _result(text, windows, dense_nats, of_dense.seconds)
    after = _result(text, windows, compressed_nats, of_compressed.seconds)
    measured = DivergenceResult(
        text=text.name,
        window=window,
        windows=len(windows),
        tokens=after.tokens,
        kl_nats_per_token=kl_nats / after.tokens,
        excess_nats_per_token=after.nats_per_token - before.nats_per_token,
        error_after_layer=error_after_layer(dense, compressed, windows[0]),
    )
    return before, after, measured


@torch.no_grad()
def error_after_layer(dense: PreTrainedModel, compressed: PreTrainedModel, ids: torch.Tensor) -> list[float]:
    """``‖h' − h‖ / ‖h‖`` of the residual stream after each decoder layer on one window of ``ids``; empty if depths differ.

    The last is taken after the final norm, as the models give it.
    """
    states = [
        model(input_ids=ids[None].to(model.device), use_cache=False, output_hidden_states=True).hidden_states
        for model in (dense, compressed)
    ]
    if len(states[0]) != len(states[1]):
        return []
    pairs = [(before.float(), after.float()) for before, after in zip(*states, strict=True)][1:]
    return [float((after - before).norm() / before.norm()) for before, after in pairs]


def _own(windows: torch.Tensor) -> torch.Tensor:
    """Those of the windows that this process measures, where several share them."""
    return windows[processes.index() :: processes.count()]


class _Forward:
    """A model that runs windows, and the seconds that it took."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.seconds = 0.0

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits ``(window - 1, vocabulary)`` that predict a window's tokens but its first."""
        started = time.monotonic()
        # The model's own forward, head included: softcaps and logit scales live there.
        logits: torch.Tensor = self._model(input_ids=ids[None].to(self._model.device), use_cache=False).logits
        self.seconds += time.monotonic() - started
        return logits[0, :-1]


def _loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Nats summed over a window's predicted tokens."""
    targets = ids[1:].to(logits.device)

    def chunk(rows: slice) -> torch.Tensor:
        return cross_entropy(logits[rows].float(), targets[rows], reduction="none")

    return _sum_rows(len(logits), chunk)


def _kl(dense: torch.Tensor, compressed: torch.Tensor) -> float:
    """KL(dense || compressed) in nats, summed over the rows."""

    def chunk(rows: slice) -> torch.Tensor:
        towards, from_ = dense[rows].float().log_softmax(-1), compressed[rows].float().log_softmax(-1)
        return kl_div(from_, towards, log_target=True, reduction="none").sum(-1)

    return _sum_rows(len(dense), chunk)


def _sum_rows(rows: int, chunk: Callable[[slice], torch.Tensor]) -> float:
    return sum(float(chunk(slice(start, start + _ROWS)).double().sum()) for start in range(0, rows, _ROWS))


def _result(text: Text, windows: torch.Tensor, nats: float, seconds: float) -> PerplexityResult:
    count, window = windows.shape
    if not math.isfinite(nats):
        raise UserError(f"the loss on {text.name} is {nats}: the checkpoint is broken, write it anew")
    tokens = count * (window - 1)
    return PerplexityResult(
        text=text.name,
        window=window,
        stride=window,
        windows=count,
        tokens=tokens,
        nats_per_token=nats / tokens,
        perplexity=math.exp(nats / tokens),
        seconds=round(seconds, 2),
    )
