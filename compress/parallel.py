"""Linears, or independent pieces of one linear's work, side by side, each on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

FEW = 1 << 22  # a matrix of 2048 x 2048

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Iterable[Item], numbers: int) -> list[Result]:
    """``function`` of every item, in order; side by side, on as many threads as torch has, if its tensors hold few ``numbers``.

    Operations on few numbers lose more by being shared among threads than they gain: a thread takes an item whole, and
    scipy's linear algebra, whose own threads would spin beside these, has one too. Those on many gain, and two items' tensors would
    be in memory together. No function may change what all threads share, such as the precision of products.
    """
    threads = torch.get_num_threads()
    if numbers > FEW or threads == 1:
        return [function(item) for item in items]
    pool = _started(threads)
    with _loaded_pools().limit(limits=1, user_api="blas"):
        torch.set_num_threads(1)  # what torch tells MKL holds for all threads
        try:
            # what is mended counts where this was called (compress/counts.py)
            futures = [pool.submit(copy_context().run, function, item) for item in items]
            try:
                return [future.result() for future in futures]
            finally:  # none goes on behind the back of whoever meets the error of another
                for future in futures:
                    future.cancel()
                wait(futures)
        finally:
            torch.set_num_threads(threads)


def start() -> None:
    """Start the threads of ``each`` now, while there is memory: python waits without end for one that could not begin for want of it."""
    threads = torch.get_num_threads()
    if threads > 1:
        _started(threads)


@cache
def _started(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    together = Barrier(threads)  # no thread is free for two of these
    wait([pool.submit(together.wait) for _ in range(threads)])
    torch.set_num_threads(threads)  # see above
    return pool


@cache
def _loaded_pools() -> ThreadpoolController:
    return ThreadpoolController()
