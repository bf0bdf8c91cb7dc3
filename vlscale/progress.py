"""Progress of long work: a bar with rate and time left on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from vlscale.logging import get_logger


class Progress:
    """`with Progress("indexing", total, "shards") as bar: bar.advance()`.

    Without a terminal on stderr there is a line every `lines_every` advances, none where that is None. `done`: advances
    made before this process. The rate is of units, which are the advances unless `advance` is told otherwise.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str,
        *,
        shown: bool = True,
        done: int = 0,
        lines_every: int | None = None,
    ):
        self._what, self._total, self._unit = what, total, unit
        self._first, self._done, self._units = done, done, 0
        terminal = shown and sys.stderr.isatty()
        self._lines_every = lines_every if shown and not terminal else None
        self._started = time.monotonic()
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not terminal,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def expect(self, total: int) -> None:
        """Set a total that was not known at first."""
        self._total = total
        self._bar.update(self._task, total=total)

    def advance(self, count: int = 1, *, units: int | None = None, note: str = "") -> None:
        """After `count` more, which were `units` units of work; `note` stands before the rate."""
        self._done += count
        self._units += count if units is None else units
        seconds = time.monotonic() - self._started
        shown = f"{note}  {self._units / seconds:,.0f} {self._unit}/s".strip()
        self._bar.update(self._task, advance=count, note=shown)
        if self._lines_every and (self._done % self._lines_every == 0 or self._done == self._total):
            left = int(seconds / (self._done - self._first) * (self._total - self._done))
            get_logger().info(
                "%s  %d/%d  %s  %d:%02d left", self._what, self._done, self._total, shown, left // 60, left % 60
            )
