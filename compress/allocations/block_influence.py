"""Whole decoder layers removed by block influence: ShortGPT's score, which FlexiGPT selects by (Men et al. 2024, arXiv 2403.03853).

``BI_l = 1 - E[cos(x_l, x_{l+1})]`` over tokens, of the hidden states that enter and leave layer l: a layer that hardly turns its
input is the first to go. One-shot and training-free (FlexiGPT's re-use of a layer with trained adapters is not).
"""

from __future__ import annotations

from collections.abc import Sequence

from compress.allocations.curve import Curve, Ranks, Unreachable


def block_influence(curves: Sequence[Curve], budget: int) -> Ranks:
    """Rank 0 (removed) for every linear of the layers of least influence, as many as it takes; the others stay dense.

    Raises Unreachable if not even one layer fits. Where influences are not known yet, the first layers are taken: of
    equal layers any choice has the same size.
    """
    layers = sorted({curve.layer for curve in curves})
    sizes = {index: sum(curve.dense for curve in curves if curve.layer == index) for index in layers}
    if budget < min(sizes.values()):
        raise Unreachable(min(sizes.values()))
    influence = {curve.layer: curve.influence or 0.0 for curve in curves}
    gone: set[int] = set()
    left = sum(sizes.values())
    for index in sorted(layers, key=lambda index: (influence[index], index)):
        if left <= budget:
            break
        left -= sizes[index]
        gone.add(index)
    return [0 if curve.layer in gone else None for curve in curves]
