"""One line per stage with count, time left and memory; in a log file, a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from checkpoint import processes
from checkpoint.memory import peak_bytes, restart_peak

LOG_SECONDS = 30.0  # between two lines of a stage where stderr is no terminal


def say(text: str) -> None:
    """A line for the person at the terminal, from one of the processes that share the job."""
    if processes.is_main():
        print(text, file=sys.stderr, flush=True)


class Stage:
    """A stage of the run: ``with Stage("collecting", layers) as stage: ... stage.step()``."""

    def __init__(self, name: str, total: int, unit: str = "layers") -> None:
        self.name = name
        self.seconds = 0.0
        self.peak_bytes = 0
        self._total, self._unit = total, unit
        self._terminal = sys.stderr.isatty() and processes.is_main()

    def __enter__(self) -> Stage:
        restart_peak()
        self._started = time.monotonic()
        self._told = self._started
        self._bar = tqdm(
            total=self._total,
            desc=f"{self.name:<18}",
            unit=self._unit,
            file=sys.stderr,
            disable=not self._terminal,
            mininterval=0.5,
            bar_format="{desc} {n_fmt}/{total_fmt} {unit}  {elapsed} elapsed, {remaining} left{postfix}",
        )
        self._done = 0
        return self

    def step(self, count: int = 1) -> None:
        """``count`` more units are done."""
        count = min(count, self._total - self._done)  # several processes step for one another
        self._done += count
        memory = f"peak memory {peak_bytes() / 1e6:.0f} MB"
        if self._terminal:
            self._bar.set_postfix_str(memory, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._told >= LOG_SECONDS or self._done == self._total:
            self._told = now
            elapsed = now - self._started
            left = elapsed * (self._total - self._done) / max(self._done, 1)
            times = f"{tqdm.format_interval(elapsed)} elapsed, {tqdm.format_interval(left)} left"
            say(f"{self.name:<18} {self._done}/{self._total} {self._unit}  {times}, {memory}")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.monotonic() - self._started
        self.peak_bytes = peak_bytes()
        self._bar.close()

    def as_dict(self) -> dict[str, float | int | str]:
        """For the report."""
        return {"stage": self.name, "seconds": round(self.seconds, 2), "peak_bytes": self.peak_bytes}
