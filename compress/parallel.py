"""Linears, or independent pieces of one linear's work, side by side, each on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
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
    waiting = list(items)
    if numbers > FEW:
        return [function(item) for item in waiting]
    threads = torch.get_num_threads()
    try:
        with (
            _loaded_pools().limit(limits=1, user_api="blas"),
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            # what is mended counts where this was called (compress/counts.py)
            contexts = [copy_context() for _ in waiting]
            return list(pool.map(lambda context, item: context.run(function, item), contexts, waiting))
    finally:
        torch.set_num_threads(threads)


@cache
def _loaded_pools() -> ThreadpoolController:
    return ThreadpoolController()
