"""What a linear becomes: plain data, shared by the methods, the driver and the writer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from checkpoint.forms import Spec


@dataclass(frozen=True)
class Factors:
    """Ordered factors of a weight: any rank is a slice.

    ``a`` is ``(d_out, k)``, ``b`` is ``(k, d_in)``; rank r keeps ``a[:, :r] @ b[:r]``. ``loss`` is float64 ``(k + 1,)``: the method's
    objective when truncated at 0 ... k, never increasing (empty where nobody asks for it). ``mean_input`` ``(d_in,)`` and
    ``mean_output`` ``(d_out,)``: where given, a bias makes up for what truncation does to the means.
    """

    a: torch.Tensor
    b: torch.Tensor
    loss: torch.Tensor
    mean_input: torch.Tensor | None = None
    mean_output: torch.Tensor | None = None

    def first(self, rank: int) -> Factors:
        """The first ``rank`` directions alone."""
        return replace(self, a=self.a[:, :rank], b=self.b[:rank], loss=self.loss[: rank + 1])

    def at_rank(self, rank: int) -> LowRank:
        """The part that keeps the first ``rank`` directions; raises ValueError if so many were not kept."""
        if not 1 <= rank <= self.a.shape[1]:
            raise ValueError(f"rank {rank} asked, {self.a.shape[1]} kept")
        a, b = self.a[:, :rank], self.b[:rank]
        if self.mean_input is None or self.mean_output is None:
            return LowRank(a, b)
        kept = a.double() @ (b.double() @ self.mean_input.double())
        return LowRank(a, b, self.mean_output.double() - kept)


@dataclass(frozen=True)
class LowRank:
    """``W' = a b`` with ``a (d_out, r)`` and ``b (r, d_in)``, in the dtype they are stored in.

    ``shift`` ``(d_out,)`` float64 or None is added to the linear's bias.
    """

    a: torch.Tensor
    b: torch.Tensor
    shift: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of directions kept."""
        return self.a.shape[1]

    @property
    def spec(self) -> Spec:
        """How it is stored."""
        return Spec("factors", self.rank)

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``."""
        return self.a.shape[0], self.b.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """As the module holds them."""
        return {"factor_in.weight": self.b, "factor_out.weight": self.a}

    def dense(self) -> torch.Tensor:
        """The product ``(d_out, d_in)``, multiplied in float32, in the factors' dtype."""
        return (self.a.float() @ self.b.float()).to(self.a.dtype)

    def bias(self, old: torch.Tensor | None) -> torch.Tensor | None:
        """The old bias plus the shift."""
        return shifted(old, self.shift)


@dataclass(frozen=True)
class Pivoted:
    """The same product as r of its own rows and the coefficients that give the others: ``r (d_out + d_in - r)`` numbers.

    ``rows`` is ``(r, d_in)``, ``coefficients`` ``(d_out - r, r)``; row j of ``W'`` is row ``order[j]`` of
    ``[rows; coefficients @ rows]``, ``order`` int32 ``(d_out,)``. ``shift`` is that of LowRank.
    """

    rows: torch.Tensor
    coefficients: torch.Tensor
    order: torch.Tensor
    shift: torch.Tensor | None = None

    @property
    def spec(self) -> Spec:
        """How it is stored."""
        return Spec("pivoted", self.rows.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``."""
        return self.order.shape[0], self.rows.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """As the module holds them."""
        return {"factor_in.weight": self.rows, "factor_out.weight": self.coefficients, "order": self.order}

    def dense(self) -> torch.Tensor:
        """The product ``(d_out, d_in)``, multiplied in float32, in the rows' dtype."""
        rest = (self.coefficients.float() @ self.rows.float()).to(self.rows.dtype)
        return torch.cat([self.rows, rest])[self.order]

    def bias(self, old: torch.Tensor | None) -> torch.Tensor | None:
        """The old bias plus the shift."""
        return shifted(old, self.shift)


@dataclass(frozen=True)
class Channels:
    """A weight ``(d_out, d_in)`` of which only some outputs (form ``output-channels``) or inputs (``input-channels``) are left.

    ``weight`` is what is left, ``kept`` the indices of the channels, int64 and rising; ``whole`` is ``(d_out, d_in)``.
    """

    weight: torch.Tensor
    kept: torch.Tensor
    whole: tuple[int, int]
    form: str

    @property
    def spec(self) -> Spec:
        """How it is stored."""
        return Spec(self.form, self.kept.numel())

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)`` before pruning."""
        return self.whole

    def tensors(self) -> dict[str, torch.Tensor]:
        """As the module holds them."""
        return {"weight": self.weight}

    def dense(self) -> torch.Tensor:
        """The weight that is left: a stock architecture of smaller width holds it as it is."""
        return self.weight

    def bias(self, old: torch.Tensor | None) -> torch.Tensor | None:
        """The bias of the outputs that are left."""
        return old[self.kept] if old is not None and self.form == "output-channels" else old


def shifted(old: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor | None:
    """A bias plus a shift ``(d_out,)`` float64; either may be None."""
    if shift is None:
        return old
    return shift if old is None else (old.detach().double() + shift).to(old.dtype)
