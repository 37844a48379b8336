"""ASVD's sensitivity-based truncation rank search (Yuan et al. 2023, arXiv 2312.05821, section 3.4).

Every linear is compressed alone at each of ``RATIOS`` and the calibration perplexity is measured. One threshold is then found for
the asked size: a linear takes the smallest ratio whose perplexity does not exceed it, and stays dense if none does. The
paper also searches the head, which is not compressed here.
"""

from __future__ import annotations

from collections.abc import Sequence

from compress.allocations.curve import Curve, Ranks, Unreachable, lowest_threshold, taken

RATIOS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def at_ratio(curve: Curve, ratio: float) -> int | None:
    """The rank that keeps a ratio of the bytes; None where that is none."""
    rank = curve.rank_within(ratio * curve.dense)
    return rank if rank >= 1 else None


def sensitivity(curves: Sequence[Curve], budget: int) -> Ranks:
    """The lowest threshold that fits, then as many ranks of the next lower one as fit.

    Raises Unreachable; ValueError where a curve has no sensitivities. No linear goes below the lowest of ``RATIOS``, so
    that is the smallest budget.
    """
    if any(len(curve.sensitivity) != len(RATIOS) for curve in curves if curve.largest >= 1):
        raise ValueError("the sensitivity of every linear at every ratio is needed")

    def at_threshold(threshold: float) -> Ranks:
        ranks: Ranks = []
        for curve in curves:
            fitting = [r for r, loss in zip(RATIOS, curve.sensitivity, strict=False) if loss <= threshold]
            ranks.append(at_ratio(curve, fitting[0]) if fitting else None)
        return ranks

    thresholds = sorted({loss for curve in curves for loss in curve.sensitivity})
    if taken(curves, [None] * len(curves)) <= budget:
        return [None] * len(curves)
    smallest = taken(curves, at_threshold(thresholds[-1])) if thresholds else taken(curves, [None] * len(curves))
    if smallest > budget:
        raise Unreachable(smallest)
    return lowest_threshold(curves, budget, thresholds, at_threshold)
