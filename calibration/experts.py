"""Experts of a mixture that saw too few tokens for moments of their own: they are lent the layer's.

An expert's linear sees the tokens that the router sends it. With fewer of them than its smaller side has dimensions the moments are
singular, and what they leave out would be thrown away though the next text may bring it. Such a linear gets the mean over its
layer's experts, weighted by their tokens, as if as many tokens had come to it as are needed. Where there is nobody to lend (a walk
collects one linear at a time), inputs are taken to be alike in every direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from calibration.moments import Moments
from calibration.structure import Linear
from checkpoint.modeling_template import Experts

# per token of the text: sums over the expert's tokens, which grow with their number
OF_TEXT = ("gradient", "pulled", "row_fisher")
OF_TOKENS = ("input", "output", "mean_absolute", "mean", "mean_square", "weighted")


def experts_in(layer: nn.Module) -> tuple[str, ...]:
    """The paths of the mixtures in a layer."""
    return tuple(name for name, module in layer.named_modules() if isinstance(module, Experts))


def kind_of(local: str, mixtures: Iterable[str]) -> str | None:
    """What an expert's linear is called, whichever the expert: ``mlp.experts.gate_up_proj``; None of any other linear."""
    for path in mixtures:
        if local.startswith(path + "."):
            return f"{path}.{local.removeprefix(path + '.').partition('.')[2]}"
    return None


def lent(moments: dict[str, Moments], linears: Sequence[Linear], mixtures: tuple[str, ...]) -> dict[str, Moments]:
    """The moments by local name, those of experts with too few tokens replaced."""
    if not mixtures:
        return moments
    needed = {linear.local: min(linear.d_out, linear.d_in) for linear in linears}
    kinds: dict[str, list[str]] = {}
    for name in moments:
        kind = kind_of(name, mixtures)
        if kind is not None:
            kinds.setdefault(kind, []).append(name)
    for names in kinds.values():
        few = [name for name in names if moments[name].tokens < needed[name]]
        if few:
            together = _together([moments[name] for name in names])
            for name in few:
                moments[name] = _of_tokens(together, needed[name])
    return moments


def _together(members: Sequence[Moments]) -> Moments:
    """The mean over members, weighted by their tokens; with the samples of the one that saw most. ``tokens`` is their sum."""
    tokens = sum(item.tokens for item in members)
    most = max(members, key=lambda item: item.tokens)
    if not tokens:
        flat: dict[str, Any] = {name: _flat(value, name) for name, value in _tensors(most).items() if name in OF_TOKENS}
        return replace(most, **flat, input_power=1.0, tokens=1)
    mean: dict[str, Any] = {}
    for name in _tensors(most):
        parts = [(value, item.tokens) for item in members if (value := getattr(item, name)) is not None]
        mean[name] = sum(
            (value * (1.0 if name in OF_TEXT else count / tokens) for value, count in parts), torch.zeros(())
        )
    power = sum(item.input_power * item.tokens for item in members) / tokens
    if len(members) == 1:  # nobody to learn from: alike in every direction, on average as what came
        for name in {"input", "output", "weighted"} & mean.keys():
            size = len(mean[name])
            mean[name] += torch.eye(size) * float(mean[name].diagonal().mean())
    samples = most.gradient_samples
    return replace(
        most,
        **mean,
        tokens=tokens,
        input_power=power,
        gradient_power=sum(item.gradient_power for item in members),
        # as if every token of all had come to it, as the sums are
        gradient_samples=None if samples is None else samples * (tokens / most.tokens) ** 0.5,
    )


def _tensors(moments: Moments) -> Mapping[str, torch.Tensor]:
    return {name: value for name in (*OF_TOKENS, *OF_TEXT) if (value := getattr(moments, name)) is not None}


def _flat(value: torch.Tensor, name: str) -> torch.Tensor:
    """What to take of a moment of which nothing is known."""
    return torch.eye(len(value)) if value.dim() == 2 else torch.ones_like(value) if name != "mean" else value


def _of_tokens(together: Moments, tokens: int) -> Moments:
    """The share of one to whom ``tokens`` of all tokens came."""
    share = tokens / together.tokens
    sums: dict[str, Any] = {name: value * share for name in OF_TEXT if (value := getattr(together, name)) is not None}
    samples = together.gradient_samples
    return replace(
        together,
        **sums,
        tokens=tokens,
        gradient_power=together.gradient_power * share,
        gradient_samples=None if samples is None else samples * share**0.5,
        borrowed=True,
    )
