"""What had to be mended so that numbers stay finite, counted: no floor goes in unseen.

``counted`` opens a count around one matrix's work; the functions that mend say so with ``count``. The threads that share a matrix's
work share its count (compress/parallel.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

_open: ContextVar[Counter[str] | None] = ContextVar("_open", default=None)
_lock = Lock()


def count(what: str, number: int = 1) -> None:
    """So many more of ``what``, if a count is open."""
    found = _open.get()
    if found is not None and number:
        with _lock:
            found[what] += number


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """A count of what is mended inside."""
    found: Counter[str] = Counter()
    before = _open.set(found)
    try:
        yield found
    finally:
        _open.reset(before)
