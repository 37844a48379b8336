"""What a linear becomes: plain data, shared by the methods, the driver and the writer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Factors:
    """Ordered factors of a weight: any rank is a slice.

    ``a`` is ``(d_out, k)``, ``b`` is ``(k, d_in)``; rank r keeps ``a[:, :r] @ b[:r]``. ``loss`` is float64
    ``(k + 1,)``: the method's objective when truncated at 0 ... k, never increasing.
    """

    a: torch.Tensor
    b: torch.Tensor
    loss: torch.Tensor

    def at_rank(self, rank: int) -> LowRank:
        """The part that keeps the first ``rank`` directions; raises ValueError if so many were not kept."""
        if not 1 <= rank <= self.a.shape[1]:
            raise ValueError(f"rank {rank} asked, {self.a.shape[1]} kept")
        return LowRank(self.a[:, :rank], self.b[:rank])


@dataclass(frozen=True)
class LowRank:
    """``W' = a b`` with ``a (d_out, r)`` and ``b (r, d_in)``, in the dtype they are stored in."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """The number of directions kept."""
        return self.a.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes

    def dense(self) -> torch.Tensor:
        """The product ``(d_out, d_in)``, multiplied in float32, in the factors' dtype."""
        return (self.a.float() @ self.b.float()).to(self.a.dtype)
