"""LoRAP's allocation: value and output keep three times the share of query and key (Li et al. 2024, arXiv 2404.09695, section 3.2).

With the kept fraction rho and four square matrices: ``3/2 rho`` for v and o, ``1/2 rho`` for q and k; where ``3/2 rho`` would not
save, v and o stay dense and q, k keep ``2 rho - 1``. Here the same is said of shares of bytes, which also fits shared
key/value heads. Every other linear (a fused qkv too, whose parts cannot be told apart) keeps rho.
"""

from __future__ import annotations

from collections.abc import Sequence

from compress.allocations.curve import Curve, Ranks, spread

PROTECTED = ("value", "attention output")
YIELDING = ("query", "key")
SHARE = 3.0  # the paper's a


def attention_types(curves: Sequence[Curve], budget: int) -> Ranks:
    """Shares by the role of a linear in its layer's attention. Raises Unreachable."""
    rho = min(budget / sum(curve.dense for curve in curves), 1.0)
    fractions: dict[tuple[int, str], float] = {}
    for layer in {curve.layer for curve in curves}:
        protected, yielding = (
            sum(curve.dense for curve in curves if curve.layer == layer and curve.role in roles)
            for roles in (PROTECTED, YIELDING)
        )
        if not protected or not yielding:
            continue
        whole = rho * (protected + yielding)
        low = whole / (SHARE * protected + yielding)
        high = SHARE * low
        if high >= 1:
            low, high = max((whole - protected) / yielding, 0.0), 1.0
        fractions |= {(layer, role): high for role in PROTECTED} | {(layer, role): low for role in YIELDING}
    return spread(curves, budget, [fractions.get((curve.layer, curve.role), rho) * curve.dense for curve in curves])
