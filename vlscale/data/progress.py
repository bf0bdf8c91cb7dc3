"""A progress bar on stderr with rate and time left."""

import sys
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """`with Progress("indexing", total, "shards") as bar: bar.advance()`. Silent where stderr is no terminal."""

    def __init__(self, what: str, total: int | None, unit: str, *, shown: bool = True):
        self._unit = unit
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not (shown and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task(what, total=total, rate="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def advance(self, count: int = 1) -> None:
        speed = self._bar.tasks[0].speed
        rate = f"{speed:,.0f} {self._unit}/s" if speed else ""
        self._bar.update(self._task, advance=count, rate=rate)
