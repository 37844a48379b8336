"""Experts of a mixture that saw too few tokens for moments of their own: they are lent the layer's.

An expert's linear sees the tokens that the router sends it. With fewer of them than its smaller side has dimensions the moments are
singular, and what they leave out would be thrown away though the next text may bring it. Such a linear gets the mean over its
layer's experts, weighted by their tokens, as if as many tokens had come to it as are needed. Where there is nobody to lend (a walk
collects one linear at a time), its inputs are taken to be alike in every direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from calibration.moments import Moments
from calibration.structure import Linear

# means over the tokens that came
OF_TOKENS = ("input", "output", "mean_absolute", "mean", "mean_square", "weighted")
# sums over those that went backward, over all of the text: they grow with their number
OF_GRADIENTS = ("gradient", "pulled", "row_fisher")


def lent(moments: dict[str, Moments], linears: Sequence[Linear], device: torch.device) -> dict[str, Moments]:
    """The moments by local name, which are on ``device``, those of experts with too few tokens replaced."""
    kinds: dict[str, list[Linear]] = {}
    for linear in linears:
        if linear.mixture and linear.local in moments:
            kinds.setdefault(linear.mixture, []).append(linear)
    for members in kinds.values():
        needed = min(members[0].d_out, members[0].d_in)
        few = [linear.local for linear in members if _seen(moments[linear.local]) < needed]
        if few:
            own = [moments[linear.local] for linear in members]
            layers = _alike(own[0], members[0], needed, device) if len(own) == 1 else _together(own, needed)
            for local in few:
                moments[local] = layers
    return moments


def _seen(moments: Moments) -> int:
    """Tokens that came, or that went backward where that was asked for and they are fewer."""
    return min(moments.tokens, moments.gradient_seen) if moments.gradient_tokens else moments.tokens


def _together(members: Sequence[Moments], needed: int) -> Moments:
    """The mean over members, weighted by their tokens, as if ``needed`` tokens had come; samples of the one that saw most."""
    tokens, backward = (max(sum(getattr(item, name) for item in members), 1) for name in ("tokens", "gradient_seen"))
    most = max(members, key=_seen)
    mean: dict[str, Any] = {}
    for name in OF_TOKENS:
        parts = [value * (item.tokens / tokens) for item in members if (value := getattr(item, name)) is not None]
        mean |= {name: sum(parts, torch.zeros(()))} if parts else {}
    for name in OF_GRADIENTS:
        parts = [value * (needed / backward) for item in members if (value := getattr(item, name)) is not None]
        mean |= {name: sum(parts, torch.zeros(()))} if parts else {}
    samples = most.gradient_samples
    return replace(
        most,
        **mean,
        tokens=needed,
        input_power=sum(item.input_power * item.tokens for item in members) / tokens,
        gradient_seen=needed if most.gradient_tokens else 0,
        gradient_power=sum(item.gradient_power for item in members) * needed / backward,
        gradient_samples=None if samples is None else samples * (needed / most.gradient_seen) ** 0.5,
        borrowed=True,
    )


def _alike(own: Moments, linear: Linear, needed: int, device: torch.device) -> Moments:
    """What came, and as much again of every direction of the input; ``input`` is read before ``output``."""
    power = own.input_power or 1.0
    flat = torch.full((linear.d_in,), power, device=device)
    came = own.input if own.input is not None else torch.zeros(linear.d_in, linear.d_in, device=device)
    return replace(
        own,
        tokens=needed,
        input_power=2 * power if own.tokens else power,
        input=came + torch.diag(flat),
        output=None,
        mean_absolute=None if own.mean_absolute is None else own.mean_absolute + flat.sqrt(),
        mean_square=None if own.mean_square is None else own.mean_square + flat,
        borrowed=True,
    )
