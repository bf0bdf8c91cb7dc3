"""What a person sees while training: a bar with rate and time left on a terminal, a line now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlscale.config import LogConfig
from vlscale.logging import get_logger


class StepProgress:
    """Progress over optimizer steps; use as a context manager. Silent on ranks other than the first."""

    def __init__(self, name: str, first_step: int, max_steps: int, log: LogConfig, shown: bool):
        self.name, self.max_steps, self.log, self.shown = name, max_steps, log, shown
        self._started, self._first = time.monotonic(), first_step
        self._samples = 0
        self._bar: Progress | None = None
        if shown and log.progress and sys.stderr.isatty():
            columns = [
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            ]
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=max_steps, completed=first_step, numbers="")

    def __enter__(self) -> "StepProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, samples: int) -> None:
        """After step `step` (from 1) over `samples` pairs."""
        self._samples += samples
        if not self.shown:
            return
        seconds = time.monotonic() - self._started
        rate = self._samples / seconds
        left = seconds / (step - self._first) * (self.max_steps - step)
        numbers = f"loss {loss:.4f}  {rate:,.0f} pairs/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self.log.every == 0 or step == self.max_steps:
            clock = f"{int(left) // 60}:{int(left) % 60:02d}"
            get_logger().info("%s  step %d/%d  %s  %s left", self.name, step, self.max_steps, numbers, clock)
