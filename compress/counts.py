"""What had to be mended so that numbers stay finite, counted: no floor goes in unseen.

``counted`` opens a count around one matrix's work; the functions that mend say so with ``count``. Threads share it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_open: list[Counter[str]] = []
_lock = Lock()


def count(what: str, number: int = 1) -> None:
    """So many more of ``what``, if a count is open."""
    with _lock:
        if _open and number:
            _open[-1][what] += number


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """A count of what is mended inside."""
    found: Counter[str] = Counter()
    _open.append(found)
    try:
        yield found
    finally:
        _open.remove(found)
