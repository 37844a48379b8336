"""The outer factor refitted on the compressed model's inputs, with the inner one as it is (DESIGN section 4, "Input drift").

With ``z = b x`` on the inputs x that the compressed model really has, and a target y: ``a = (E[y z^T] + l a0) (E[z z^T] + l I)^-1``.
This is least squares, the same under any weighting of the outputs; the ridge ``l`` pulls towards the factor a0 as it was,
not towards zero. Targets: ``update``, ``y = W x`` on those same inputs (SVD-LLM's closed-form update, arXiv 2403.07378, section
3.3), or ``anchored``, the dense model's own output on its own inputs (reduced-rank form: METHODS 1.4).
"""

from __future__ import annotations

import torch

from calibration.moments import Cross

REFITS = ("none", "update", "anchored")


def refit(a: torch.Tensor, cross: Cross, ridge: float) -> torch.Tensor:
    """The refitted outer factor ``(d_out, r)`` float64; ``ridge`` is the multiple of the mean of ``E[z z^T]``'s diagonal.

    Where ``z`` vanishes throughout, ``a`` stays as it is.
    """
    inner = cross.inner.double()
    power = float(inner.diagonal().mean())
    if power == 0:
        return a.double()
    weight = ridge * power
    right = cross.target_inner.double() + weight * a.double().to(cross.inner.device)
    left = (inner + inner.T) / 2
    left.diagonal().add_(weight)
    return torch.linalg.solve(left, right, left=False)
