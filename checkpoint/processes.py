"""Several processes that share one job, as ``accelerate launch`` or a batch system starts them; otherwise there is one.

Every process goes through the same stages in the same order, so that each call here meets its like in the others. What
one process alone may do (take the lock, write a record, speak) the main one does.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from checkpoint.errors import UserError

LONGEST_WAIT = timedelta(days=14)  # for the main process, while it writes, checks or evaluates alone
PIECE = 1 << 24  # numbers that are summed at a time: the backend's own buffers are as large

Item = TypeVar("Item")
Result = TypeVar("Result")


def join() -> None:
    """Join the processes that a launcher started with this one (gloo on CPUs); does nothing if there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        from accelerate import PartialState

        with _peers():
            PartialState(cpu=True, timeout=LONGEST_WAIT)


def leave() -> None:
    """Let go of the others: the job is done."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def count() -> int:
    """How many processes share the job."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def index() -> int:
    """This process's number, from 0, the main one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return index() == 0


@contextmanager
def _peers() -> Iterator[None]:
    """UserError where another process has ended."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:
        raise UserError(
            "another process of this job has ended; the same command goes on from what is finished"
        ) from problem


def wait() -> None:
    """Until all are here."""
    if count() > 1:
        with _peers():
            distributed.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through this before the others: it brings what they then find."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def of_main(make: Callable[[], Result]) -> Result:
    """What ``make`` gives in the main process, in all of them; it can be pickled. The others do not run it."""
    if count() == 1:
        return make()
    box = [make() if is_main() else None]
    with _peers():
        distributed.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def add_up(totals: Sequence[torch.Tensor]) -> None:
    """Give each tensor, in place, the sum over all processes."""
    if count() == 1:
        return
    with _peers():
        for total in totals:
            for piece in total.view(-1).split(PIECE):
                distributed.all_reduce(piece)


def added_up(numbers: Sequence[float]) -> list[float]:
    """The sums of some numbers over all processes."""
    totals = torch.tensor(numbers, dtype=torch.float64)
    add_up([totals])
    return totals.tolist()


def rows_of_all(rows: torch.Tensor) -> torch.Tensor:
    """The rows ``(n, d)`` of all processes, one process's after the other's; each may have another n."""
    if count() == 1:
        return rows
    every = united({f"{index():06d}": rows})
    return torch.cat([every[name] for name in sorted(every)]).to(rows.device)


def united(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of all processes, in the host's memory of each, by name; none has a name that another has."""
    tensors = {name: item.cpu() for name, item in tensors.items()}
    if count() == 1:
        return tensors
    every: list[Any] = [None] * count()
    with _peers():
        distributed.all_gather_object(every, [(name, item.shape, item.dtype) for name, item in tensors.items()])
        found: dict[str, torch.Tensor] = {}
        for source, headers in enumerate(every):
            for name, shape, dtype in headers:
                item = tensors[name].contiguous() if source == index() else torch.empty(shape, dtype=dtype)
                if item.numel():
                    distributed.broadcast(item.view(-1).view(torch.uint8), src=source)
                found[name] = item
    return found


def notes_of_all(notes: Mapping[str, Any]) -> dict[str, Any]:
    """The small things, by name, of all processes in each of them; they can be pickled."""
    if count() == 1:
        return dict(notes)
    every: list[Any] = [None] * count()
    with _peers():
        distributed.all_gather_object(every, dict(notes))
    return {name: note for each in every for name, note in each.items()}


def own_batches(items: int, batch: int) -> torch.Tensor:
    """Which of ``items`` things are this process's, int64 rising: whole batches, dealt out in turn."""
    numbers = torch.arange(items)
    return numbers[numbers // batch % count() == index()]


def own_share(items: Sequence[Item], work: Callable[[Item], float]) -> list[Item]:
    """The items that this process does: each goes, the most ``work`` first, to the process that has least so far."""
    loads = [0.0] * count()
    mine = []
    for item in sorted(items, key=work, reverse=True):
        least = loads.index(min(loads))
        loads[least] += work(item)
        if least == index():
            mine.append(item)
    return mine


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def child_environment() -> dict[str, str]:
    """What tells the processes that these start, one each, where to meet one another; nothing if this one is alone."""
    if count() == 1:
        return {}
    return {"MASTER_PORT": str(of_main(free_port)), "TORCHELASTIC_USE_AGENT_STORE": "False"}
