"""Compressed parts as running modules, in the places of their linears."""

from __future__ import annotations

import torch

from calibration.replay import OpenLayer
from calibration.structure import Linear
from checkpoint.forms import Part, multiplied_out, stored_module
from compress.plan import Plan


def module_for(plan: Plan, open_layer: OpenLayer, linear: Linear, part: Part) -> torch.nn.Module:
    """A compressed part, which is in the host's memory, as the checkpoint will hold it, where the layer runs."""
    original = open_layer.linear(linear.local)
    bias: torch.Tensor | None = original.bias.cpu() if linear.has_bias else None  # type: ignore[assignment]
    make = multiplied_out if plan.recipe.export == "dense" else stored_module
    return make(part, bias, plan.source.compute_dtype).to(plan.source.device)


def install(plan: Plan, open_layer: OpenLayer, linear: Linear, part: Part) -> None:
    """Put a compressed part in the place of its linear."""
    open_layer.install(linear.local, module_for(plan, open_layer, linear, part))
