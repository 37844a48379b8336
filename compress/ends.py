"""The menu of the embedding and the head: packed integers, with the loss that each grid would cost.

GPTQ on a second moment that stands for all rows alike: of the head's inputs where the weight makes logits, of the loss gradient
where it makes the first layer's input, and for a tied weight their sum, each as large as it is in the loss: a row's
curvature as a head is ``E[p_v (1 - p_v) h h^T]``, as an embedding ``E[1(token = v) g g^T]``, summed over rows
``E[1 - sum p^2] E[h h^T]`` (with doubt and states taken as independent) and ``E[g g^T]``.
"""

from __future__ import annotations

from typing import Any

import torch

from calibration.ends import END_ROWS, embedding_loss, embedding_moment, head_divergence, head_moment, roles_of
from calibration.structure import Linear
from calibration.sweep import Sweep
from checkpoint.forms import Grid
from compress.candidates import Candidate
from compress.linears import kept_candidates, noted
from compress.plan import Plan
from compress.quantizers.gptq import Columns, Levels
from compress.quantizers.grid import Quantized, find_scales
from compress.records import candidate_record


def end_menus(plan: Plan, sweep: Sweep) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Records and notes of the embedding and the head, where they have a menu."""
    tensors: dict[str, torch.Tensor] = {}
    notes: dict[str, Any] = {}
    for end in plan.structure.ends:
        with noted(notes, end):
            tensors |= _menu(plan, sweep, end)
    return tensors, notes


def _menu(plan: Plan, sweep: Sweep, end: Linear) -> dict[str, torch.Tensor]:
    menu = plan.recipe.storage.menu(end)
    if not menu:
        return {}
    name = f"{end.name}.weight"
    embeds, heads = roles_of(sweep, end)
    device = sweep.source.device
    moment = torch.zeros(end.d_in, end.d_in, device=device)
    if heads:
        states, doubt = head_moment(sweep)
        moment += doubt * states
    if embeds:
        moment += embedding_moment(sweep)
    columns = Columns(moment, plan.recipe.quantizer_damping)
    weight = sweep.source.read(sweep.source.stored(name)).to(device)
    found = {}
    for grid in (spec.weight for spec in menu if spec.weight):
        quantized, as_read = _rounded(weight, grid, moment, columns)
        changed = {name: as_read}
        nats = head_divergence(sweep, changed) if heads else 0.0
        nats += embedding_loss(sweep, changed) if embeds else 0.0
        losses = torch.tensor([nats], dtype=torch.float64)
        found[grid] = losses, candidate_record(Candidate(quantized, None, losses), end)
    loss = torch.full((len(menu) + 1,), torch.inf, dtype=torch.float64)
    tensors = kept_candidates(plan, end, found, loss)
    return tensors | {f"{end.local}.loss": loss}


def _rounded(
    weight: torch.Tensor, grid: Grid, moment: torch.Tensor, columns: Columns
) -> tuple[Quantized, torch.Tensor]:
    """``weight`` ``(rows, width)`` on the grid, and what it then reads as, in its dtype.

    Some rows at a time, which do not know of one another: float32 of all of a vocabulary would be several times its size.
    """
    groups = grid.groups(weight.shape[1])
    codes, as_read = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight)
    scale = weight.new_empty(len(weight), groups)
    zero = None if grid.symmetric else weight.new_empty(len(weight), groups, dtype=torch.int8)
    for first in range(0, len(weight), END_ROWS):
        rows = slice(first, first + END_ROWS)
        levels = Levels(grid, *find_scales(weight[rows], grid, moment.diagonal(), weight.dtype))
        part = levels.quantized(columns.round([weight[rows].float()], [levels])[0])
        codes[rows], scale[rows], as_read[rows] = part.codes, part.scale, part.dense()
        if zero is not None and part.zero is not None:
            zero[rows] = part.zero
    return Quantized(codes, scale, zero, grid), as_read
