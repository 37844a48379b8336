"""One line per stage with count, time left and memory; peaks are the process's own high-water mark."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from checkpoint.memory import peak_bytes


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


class Stage:
    """A stage of the run: ``with Stage("collecting", layers) as stage: ... stage.step()``."""

    def __init__(self, name: str, total: int, unit: str = "layers") -> None:
        self.name = name
        self.seconds = 0.0
        self.peak_bytes = 0
        self._total, self._unit = total, unit

    def __enter__(self) -> Stage:
        self._started = time.monotonic()
        self._bar = tqdm(
            total=self._total,
            desc=f"{self.name:<22}",
            unit=self._unit,
            file=sys.stderr,
            disable=False,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            bar_format="{desc} {n_fmt}/{total_fmt} {unit}  {elapsed} elapsed, {remaining} left{postfix}",
        )
        return self

    def step(self, count: int = 1) -> None:
        """``count`` more units are done."""
        self._bar.set_postfix_str(f"peak memory {peak_bytes() / 1e6:.0f} MB", refresh=False)
        self._bar.update(count)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.monotonic() - self._started
        self.peak_bytes = peak_bytes()
        self._bar.close()

    def as_dict(self) -> dict[str, float | int | str]:
        """For the report."""
        return {"stage": self.name, "seconds": round(self.seconds, 2), "peak_bytes": self.peak_bytes}
