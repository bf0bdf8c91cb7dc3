"""Progress of long work: a bar with rate and time left on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from vlscale.logging import get_logger

LINE_SECONDS = 10.0  # between lines of work that has no steps to count


class Progress:
    """`with Progress("indexing", total, "shards") as bar: bar.advance()`.

    Without a terminal on stderr there is a line every `lines_every` advances, or every `line_seconds`, and one at the
    end; none where both are None. `done`: advances made before this process. The rate is of units, which are the
    advances unless `advance` is told otherwise.
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
        line_seconds: float | None = None,
    ):
        self._what, self._total, self._unit = what, total, unit
        self._first, self._done, self._units = done, done, 0
        terminal = shown and sys.stderr.isatty()
        lines = shown and not terminal
        self._lines_every, self._line_seconds = (lines_every, line_seconds) if lines else (None, None)
        self._started = self._last_line = time.monotonic()
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
        self.stop()

    def stop(self) -> None:
        """Leave the bar as it stands, for another one to follow."""
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
        if self._line_is_due():
            self._last_line = time.monotonic()
            left = int(seconds / (self._done - self._first) * (self._total - self._done))
            get_logger().info(
                "%s  %d/%d  %s  %d:%02d left", self._what, self._done, self._total, shown, left // 60, left % 60
            )

    def _line_is_due(self) -> bool:
        if (self._lines_every is None and self._line_seconds is None) or self._done == self._first or not self._total:
            return False
        counted = self._lines_every is not None and self._done % self._lines_every == 0
        waited = self._line_seconds is not None and time.monotonic() - self._last_line >= self._line_seconds
        return counted or waited or self._done == self._total
