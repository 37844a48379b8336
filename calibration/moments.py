"""Second moments of a linear's input or output, summed in float32 while a layer runs.

This is what passes from calibration to compress. Only the smaller side is kept: the input's
``C = E[x x^T]`` where some linear of the group is no wider than tall, else each output's
``S = E[y y^T] = W C W^T`` (without the bias). Gradient moments are kept on the smaller side too: ``G = E[g g^T]`` of a
wide linear, ``P = W^T G W`` of a tall one, as the second moment of ``W^T g``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from calibration.gram import ROWS, across, add_gram
from calibration.products import product
from checkpoint import processes
from checkpoint.device import CPU

# what is needed of the loss gradient, besides samples
OF_GRADIENTS = frozenset({"gradient", "output_gradient", "row_fisher", "weighted"})
# what is known of a linear's activations, without going backward
OF_ACTIVATIONS = frozenset({"second", "input", "mean_absolute", "mean", "mean_square"})
PART = 256  # columns of a moment that are float64 at a time
AT_A_TIME = 1 << 20  # numbers that are made float32, where nothing is kept of them: more would be new memory every time
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Moments:
    """Means over ``tokens`` tokens, float32: those that came to the linear, of which a mixture's expert sees some.

    ``input``: ``(d_in, d_in)`` or None; ``output``: ``(d_out, d_out)`` or None; ``mean_absolute``:
    ``(d_in,)`` or None, as are ``mean`` and ``mean_square``; ``input_power``: ``E[|x|^2] / d_in``, the mean of the input
    moment's diagonal.

    ``gradient_seen`` of the tokens that came to the linear went backward. Of the gradient ``g`` of the summed loss at the output there
    are sums over these, over ``gradient_tokens``, which are all of the text that went backward (so that losses are per token of the
    text): ``gradient`` ``(d_out, d_out)`` or None; ``pulled`` ``(d_in, d_in)`` or None; ``gradient_power``: ``E[|g|^2] / d_out``;
    ``weighted`` ``(d_in, d_in)`` or None: ``E[|g|^2 x x^T] / E[|g|^2]``, the input's moment with each token counted by what the
    loss makes of it, ``|g|^2`` summed over the linears that share the input;
    ``row_fisher`` ``(d_out,)`` or None: ``E[g_i^2 |x|^2]``, the Fisher information of row i summed over its weights;
    ``input_samples`` ``(n, d_in)`` and ``gradient_samples`` ``(n, d_out)``: the same n tokens, drawn evenly; the gradients are scaled
    so that the mean of their squares is such a sum.

    ``borrowed``: too few tokens came, and these are the layer's (calibration/experts.py).
    """

    tokens: int
    input_power: float
    input: torch.Tensor | None = None
    output: torch.Tensor | None = None
    mean_absolute: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    mean_square: torch.Tensor | None = None
    gradient_tokens: int = 0
    gradient_seen: int = 0
    gradient_power: float = 0.0
    gradient: torch.Tensor | None = None
    pulled: torch.Tensor | None = None
    weighted: torch.Tensor | None = None
    row_fisher: torch.Tensor | None = None
    input_samples: torch.Tensor | None = None
    gradient_samples: torch.Tensor | None = None
    borrowed: bool = False

    def of_output(self, weight: torch.Tensor) -> torch.Tensor:
        """``W C W^T`` in float64, new, from whichever side was kept; ``weight`` is ``(d_out, d_in)`` float64."""
        if self.input is not None:
            # a part at a time: float64 of the whole moment of a wide input would be the largest thing in memory
            second = weight.new_zeros(len(weight), len(weight))
            for columns, part in zip(weight.split(PART, dim=1), self.input.split(PART, dim=1), strict=True):
                second += product(product(weight, part.double()), columns.T)
            return second
        if self.output is None:
            raise ValueError("no second moment was collected")
        return self.output.to(torch.float64, copy=True)


def sample_batches(x: torch.Tensor, g: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Samples ``(n, d_in)`` and ``(n, d_out)`` of the same tokens, ``ROWS`` at a time: in float32 all would take as much as a layer."""
    yield from zip(x.split(ROWS), g.split(ROWS), strict=True)


@dataclass(frozen=True)
class Cross:
    """Means over tokens, float32: ``target_inner`` ``E[y z^T] (d_out, r)`` and ``inner`` ``E[z z^T] (r, r)``."""

    target_inner: torch.Tensor
    inner: torch.Tensor


def module_weight(module: torch.nn.Module) -> torch.Tensor:
    """The weight as ``(d_out, d_in)``: a view, transposed for transformers' Conv1D."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def _pull_into(total: torch.Tensor, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Add to ``total`` what the linear of these arguments sends backward, ``W^T g``: autograd computes it anyway."""
    if not args[0].requires_grad:
        return None
    own = args[0].view_as(args[0])  # linears that share an input each get a gradient of their own
    own.register_hook(lambda pulled: add_gram(total, pulled.reshape(-1, pulled.shape[-1])))
    return (own, *args[1:])


def squared_lengths(rows: torch.Tensor) -> torch.Tensor:
    """``|x|^2`` of ``rows`` ``(tokens, d)``, float32."""
    few = max(1, AT_A_TIME // rows.shape[1])
    return torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in rows.split(few)]).square_()


# sums over tokens of a function of each input channel, by the name of the moment
CHANNELS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean_absolute": torch.abs,
    "mean": lambda rows: rows,
    "mean_square": lambda rows: rows.float().square(),
}


class Rows:
    """Kept rows, in one block from the start: small pieces kept between the large ones of a pass would hold the heap open."""

    def __init__(self, capacity: int, width: int, device: torch.device) -> None:
        self._capacity, self._width, self._used, self._device = capacity, width, 0, device
        self._block: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Keep ``rows`` ``(n, d)``."""
        if self._block is None:
            self._block = rows.new_empty(self._capacity, rows.shape[1])
        self._block[self._used : self._used + len(rows)] = rows
        self._used += len(rows)

    def kept(self) -> torch.Tensor | None:
        """All rows, of all processes, or None if there was none."""
        if not self._capacity:
            return None
        own = torch.empty(0, self._width, device=self._device) if self._block is None else self._block[: self._used]
        every = processes.rows_of_all(own)
        return every if len(every) else None


def moment_bytes(
    sizes: Mapping[str, tuple[int, int]], needs: frozenset[str], samples: int, itemsize: int
) -> dict[str, int]:
    """Bytes that a ``GroupCollector`` sums: under ``""`` what its linears share, under each one's name its own.

    ``sizes`` is ``(d_out, d_in)`` by name; ``samples`` tokens are kept in ``itemsize`` bytes a number where ``samples`` are needed.
    """
    single = torch.float32.itemsize
    width = next(iter(sizes.values()))[1]
    second = "second" in needs
    at_input = "input" in needs or (second and any(d_in <= d_out for d_out, d_in in sizes.values()))
    kept = samples * itemsize if "samples" in needs else 0
    square = single * width**2
    found = {
        "": square * (at_input + ("weighted" in needs)) + single * width * len(CHANNELS.keys() & needs) + kept * width
    }
    for name, (d_out, d_in) in sizes.items():
        tall = "gradient" in needs and d_in < d_out
        at_output = "output_gradient" in needs or ("gradient" in needs and d_out <= d_in)
        squares = single * d_out**2 * ((second and not at_input) + at_output) + single * d_in**2 * tall
        found[name] = squares + single * d_out * ("row_fisher" in needs) + kept * d_out
    return found


class GroupCollector:
    """Sums the moments of the ``wanted`` of a group of linears that share an input, through forward hooks.

    ``needs`` names what the method uses: ``second``, ``input`` (the input's moment, whichever side is smaller), ``mean_absolute``,
    ``mean``, ``mean_square``, and of the ``batches`` that are run under autograd ``gradient`` (on the smaller side),
    ``output_gradient`` (at the output, whichever side is smaller), ``weighted``, ``row_fisher`` and ``samples``, which keeps
    ``samples`` tokens of every batch, drawn by the batch's number in ``batches``. Of several processes each sees some batches. Sums are
    made on ``device``.
    """

    def __init__(
        self,
        sizes: dict[str, tuple[int, int]],
        wanted: Sequence[str],
        needs: frozenset[str],
        samples: int = 0,
        batches: range = range(0),
        device: torch.device = CPU,
    ) -> None:
        zeros = partial(torch.zeros, device=device)
        self._sizes = sizes
        self._wanted = wanted
        own = {name: sizes[name] for name in wanted}
        self._first = next(iter(sizes))
        width = sizes[self._first][1]
        at_input = any(d_in <= d_out for d_out, d_in in sizes.values())
        self._tokens = 0
        self._power = 0.0
        second = "second" in needs
        self._input = zeros(width, width) if (second and at_input) or "input" in needs else None
        by_output = second and self._input is None
        self._outputs = {name: zeros(d, d) for name, (d, _) in own.items()} if by_output else {}
        self._of_channels = {name: (function, zeros(width)) for name, function in CHANNELS.items() if name in needs}
        self._row_fisher = {name: zeros(d) for name, (d, _) in own.items() if "row_fisher" in needs}
        self._lengths = torch.empty(0)  # |x|^2 of the tokens of the batch that is going backward
        self._weighted = zeros(width, width) if "weighted" in needs else None
        self._weights = 0.0
        self._rows = torch.empty(0)  # the inputs of that batch, and |g|^2 of its tokens for the linears seen so far
        self._of_tokens: list[torch.Tensor] = []
        self._pulled = {
            name: zeros(d_in, d_in) for name, (d_out, d_in) in own.items() if "gradient" in needs and d_in < d_out
        }
        self._gradients = {
            name: zeros(d_out, d_out)
            for name, (d_out, d_in) in own.items()
            if "output_gradient" in needs or ("gradient" in needs and d_out <= d_in)
        }
        self._per_batch = samples if "samples" in needs else 0
        self._batches = iter(batches)
        self._picked = torch.empty(0, dtype=torch.int64)
        self._input_samples = Rows(self._per_batch * len(batches), width, device)
        self._gradient_samples = {name: Rows(self._per_batch * len(batches), sizes[name][0], device) for name in wanted}
        # what weighs a token is the gradients of the whole group
        self._watched = list(sizes if "weighted" in needs else own) if needs & OF_GRADIENTS else []
        self._gradient_tokens = dict.fromkeys(self._watched, 0)
        self._gradient_power = dict.fromkeys(self._watched, 0.0)

    @property
    def reads_inputs_alone(self) -> bool:
        """Whether everything is known once the group's first linear is about to run."""
        return not self._outputs and not self._watched and not self._pulled

    def sums_of_activations(self) -> dict[str, torch.Tensor]:
        """What has been summed so far without going backward, by the name of the group's first linear, or of a linear, and what it is."""
        shared = {"counts": torch.tensor([self._tokens, self._power], dtype=torch.float64)}
        shared |= {name: total for name, (_, total) in self._of_channels.items()}
        shared |= {} if self._input is None else {"input": self._input}
        found = {f"{self._first}.{name}": total for name, total in shared.items()}
        return found | {f"{name}.output": total for name, total in self._outputs.items()}

    def add_sums(self, sums: Mapping[str, torch.Tensor]) -> None:
        """Add what another collector of these linears has summed; there may be other linears' in ``sums`` too."""
        for name, total in self.sums_of_activations().items():
            total += sums[name].to(total.device)
            if name == f"{self._first}.counts":
                self._tokens, self._power = int(total[0]), float(total[1])

    @property
    def names(self) -> tuple[str, ...]:
        """The linears of the group."""
        return tuple(self._sizes)

    def hooks(self, modules: dict[str, torch.nn.Module]) -> list[torch.utils.hooks.RemovableHandle]:
        """Register on the group's modules; the caller removes the handles."""
        handles = [modules[self._first].register_forward_pre_hook(lambda _, args: self.see_input(args[0]))]
        for name in self._outputs:
            handles.append(
                modules[name].register_forward_hook(
                    lambda module, _, y, name=name: self.see_output(name, y, module.bias)
                )
            )
        for name in self._watched:
            handles.append(
                modules[name].register_forward_hook(lambda _, args, y, name=name: self._watch(name, args[0], y))
            )
        for name, total in self._pulled.items():
            handles.append(
                modules[name].register_forward_pre_hook(lambda _, args, total=total: _pull_into(total, args))
            )
        return handles

    def _watch(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        if not y.requires_grad:
            return
        y.register_hook(lambda gradient: self.see_gradient(name, gradient))
        if name == self._watched[0]:  # keep what the gradients of the group will be paired with
            rows = x.detach().reshape(-1, x.shape[-1])
            if self._row_fisher:
                self._lengths = squared_lengths(rows)
            if self._weighted is not None:
                self._rows = rows
            if self._per_batch:
                self._picked = self._pick(rows.shape[0], rows.device)
                self._input_samples.add(rows[self._picked])

    @torch.no_grad()
    def see_input(self, x: torch.Tensor) -> None:
        """Add a batch of inputs ``(..., d_in)``."""
        rows = x.reshape(-1, x.shape[-1])
        self._tokens += rows.shape[0]
        if self._input is None:
            self._power += float(squared_lengths(rows).sum()) / rows.shape[1]
        else:
            add_gram(self._input, rows)
        for function, total in self._of_channels.values():
            total += function(rows).sum(0, dtype=torch.float32)

    @torch.no_grad()
    def see_output(self, name: str, y: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Add a batch of outputs ``(..., d_out)``; the bias is taken off."""
        rows = y.reshape(-1, y.shape[-1])
        add_gram(self._outputs[name], rows if bias is None else rows - bias)

    def _pick(self, rows: int, device: torch.device) -> torch.Tensor:
        """The tokens of this batch to keep: drawn, because a regular stride would meet every window's first token.

        That token's activations are often enormous, and ten times too many of it would rule the samples.
        """
        generator = torch.Generator().manual_seed(next(self._batches))
        return torch.randperm(rows, generator=generator)[: self._per_batch].sort().values.to(device)

    @torch.no_grad()
    def see_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """Add a batch of output gradients ``(..., d_out)``."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        d_out, d_in = self._sizes[name]
        self._gradient_tokens[name] += rows.shape[0]
        if name in self._gradient_samples and self._per_batch:
            self._gradient_samples[name].add(rows[self._picked])
        if name in self._gradients:
            add_gram(self._gradients[name], rows)
        else:
            self._gradient_power[name] += float(squared_lengths(rows).sum()) / d_out
        if name in self._row_fisher:
            self._row_fisher[name] += self._lengths @ rows.float().square()
        if self._weighted is not None:
            self._of_tokens.append(squared_lengths(rows))
            if len(self._of_tokens) == len(self._sizes):
                self._add_weighted(self._weighted, torch.stack(self._of_tokens).sum(0))
                self._of_tokens.clear()

    def _add_weighted(self, total: torch.Tensor, weights: torch.Tensor) -> None:
        """Add ``sum of w_t x_t x_t^T``: a Gram matrix of rounded rows is as good a one, and is made as fast as any."""
        add_gram(total, self._rows * weights.sqrt().to(self._rows.dtype).unsqueeze(1))
        self._weights += float(weights.sum())

    def _add_up(self) -> None:
        """Sums of this process to sums of all."""
        squares = [total for total in (self._input, self._weighted) if total is not None]
        by_name = (self._outputs, self._pulled, self._gradients, self._row_fisher)
        channels = [total for _, total in self._of_channels.values()]
        processes.add_up(squares + channels + [total for totals in by_name for total in totals.values()])
        counts = [
            self._tokens,
            self._power,
            self._weights,
            *self._gradient_tokens.values(),
            *self._gradient_power.values(),
        ]
        tokens, self._power, self._weights, *rest = processes.added_up(counts)
        self._tokens = int(tokens)
        self._gradient_tokens = dict(zip(self._watched, map(int, rest), strict=False))
        self._gradient_power = dict(zip(self._watched, rest[len(self._watched) :], strict=True))

    def moments(self, gradient_tokens: int) -> dict[str, Moments]:
        """Per wanted linear; members share the tensors of the input side. To be asked once: sums become means in place.

        ``gradient_tokens`` of the text went backward, whether or not they came to these linears.
        """
        self._add_up()
        count = max(self._tokens, 1)
        shared = None if self._input is None else across(self._input).div_(count)
        power = self._power / count if shared is None else float(shared.diagonal().mean())
        weighted = None if self._weighted is None else across(self._weighted).div_(max(self._weights, TINY))
        channels = {name: total.div_(count) for name, (_, total) in self._of_channels.items()}
        found = {}
        for name in self._wanted:
            output = across(self._outputs[name]).div_(count) if name in self._outputs else None
            moments = Moments(
                self._tokens,
                power,
                shared,
                output,
                mean_absolute=channels.get("mean_absolute"),
                mean=channels.get("mean"),
                mean_square=channels.get("mean_square"),
            )
            if name in self._watched:
                seen = max(gradient_tokens, 1)
                share = self._gradient_tokens[name] / seen
                samples = self._gradient_samples[name].kept()
                rows = self._row_fisher[name].div_(seen) if name in self._row_fisher else None
                gradient = across(self._gradients[name]).div_(seen) if name in self._gradients else None
                power_back = (
                    self._gradient_power[name] / seen if gradient is None else float(gradient.diagonal().mean())
                )
                moments = replace(
                    moments,
                    gradient_tokens=gradient_tokens,
                    gradient_seen=self._gradient_tokens[name],
                    gradient_power=power_back,
                    gradient=gradient,
                    pulled=across(self._pulled[name]).div_(seen) if name in self._pulled else None,
                    weighted=weighted,
                    row_fisher=rows,
                    input_samples=self._input_samples.kept(),
                    gradient_samples=samples if samples is None or share == 1 else samples * share**0.5,
                )
            found[name] = moments
        return found
