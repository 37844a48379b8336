"""Truncation whitened by the input's full second moment: SVD-LLM and LLM-ROM.

SVD-LLM (Wang et al. 2024, arXiv 2403.07378, algorithm 1) takes the Cholesky root of ``C = E[x x^T]``;
LLM-ROM (Chavan et al. 2023, arXiv 2312.07046) the principal components of the output features. Both are
the optimum of ``E|(W - W') x|^2``; the recipes differ in what the statistics see: the dense model's
inputs (svd-llm, one-shot) or those of the already compressed model (llm-rom, sequential).
"""

from __future__ import annotations

import torch

from calibration.moments import Moments
from calibration.products import product
from compress.parts import Factors
from compress.truncation import damping_floor, root_of, truncate_by_input, truncate_by_output


def whitened(weight: torch.Tensor, moments: Moments, rank: int, damping: float) -> Factors:
    """Best rank-``rank`` ``W'`` for ``E|(W - W') x|^2 + damping * E|x|^2 / d_in * |W - W'|^2``.

    ``weight`` ``(d_out, d_in)`` float64. The damping keeps, at full rank, the directions that the text
    did not excite.
    """
    floor = damping_floor(damping, moments.input_power)
    if weight.shape[0] <= weight.shape[1]:
        second = moments.of_output(weight).add_(product(weight, weight.T), alpha=floor)
        return truncate_by_output(weight, second, rank)
    if moments.input is None:
        raise ValueError("a tall weight needs its input's second moment")
    second = moments.input.to(torch.float64, copy=True)
    second.diagonal().add_(floor)
    root = root_of(second)
    del second  # of a small model what is side by side is the largest in memory
    return truncate_by_input(weight, root, rank)
