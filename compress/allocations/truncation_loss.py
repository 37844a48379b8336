"""SVD-LLM V2's allocation by theoretical truncation loss (Wang et al. 2025, arXiv 2503.12340, section 3.1).

Among the linears of one type over all layers, with ``L_i`` the loss ``|W X - W' X|_F`` of truncating at the uniform rank: the
removed fraction of linear i is ``n R (1 / log L_i) / sum_j (1 / log L_j)``, R the fraction removed on average and n their number. The
paper says no more: here a type is a role, L is over all calibration tokens, and where ``log L`` is below 1 it
counts as 1 (the formula has no meaning for L <= 1). A linear from which nothing would be removed stays dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.allocations.curve import Curve, Ranks, spread
from compress.allocations.uniform import uniform


def truncation_loss(curves: Sequence[Curve], budget: int) -> Ranks:
    """Shares by each linear's loss at its uniform rank, within its role. Raises Unreachable; ValueError without losses."""
    if any(curve.largest >= 1 and not curve.loss for curve in curves):
        raise ValueError("the loss of every rank is needed")
    removed = max(1.0 - budget / sum(curve.dense for curve in curves), 0.0)
    weights = []
    for curve, rank in zip(curves, uniform(curves, budget), strict=True):
        total = 0.0 if rank is None else math.sqrt(curve.tokens * curve.loss[rank])
        weights.append(1.0 / max(math.log(total), 1.0) if total > 0 else 1.0)
    shares = []
    for curve, weight in zip(curves, weights, strict=True):
        peers = [other for item, other in zip(curves, weights, strict=True) if item.role == curve.role]
        shares.append((1.0 - min(removed * weight * len(peers) / sum(peers), 1.0)) * curve.dense)
    return spread(curves, budget, shares)
