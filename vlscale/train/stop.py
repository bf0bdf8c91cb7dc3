"""When a run saves or stops between two steps: a signal, the file `stop` in its folder, or minutes gone by.

To stop, the step that runs is finished, a checkpoint is saved, and the process ends with exit code 75.
"""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from vlscale.distributed import Ranks
from vlscale.train.disk_faults import optional

EXIT_CODE = 75  # EX_TEMPFAIL: the same command with --resume goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM and the cloud's preemption; `kill -USR1` by hand

STOP_FILE = "stop"


class StoppedBySignal(SystemExit):
    """Ends the process with exit code 75, after the checkpoint is complete."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


@dataclass(frozen=True)
class Asked:
    """What all ranks do at the end of a step. `by` is empty, or what asked them to stop."""

    save: bool
    by: str
    busy: bool  # some rank still writes a checkpoint


class StopWatch:
    """Notices signals and the stop file while it is entered, and how long ago the last checkpoint was; what any rank
    notices, all of them do at the same step."""

    def __init__(self, ranks: Ranks, folder: Path, minutes: float | None = None):
        self._ranks, self._file = ranks, folder / STOP_FILE
        self._seconds = None if minutes is None else minutes * 60
        self._seen = False
        self._before: dict[int, object] = {}
        self._saved = time.monotonic()

    def __enter__(self) -> "StopWatch":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self, *, busy: bool = False) -> Asked:
        """Called by all ranks together. The file and the clock are those of rank 0. `busy`: this rank still writes."""
        first = self._ranks.first
        filed = first and self._file.exists()
        late = first and self._seconds is not None and time.monotonic() - self._saved >= self._seconds
        own = torch.tensor([self._seen, filed, late, busy], dtype=torch.int64, device=self._ranks.device)
        signalled, filed, late, writing = self._ranks.sum(own).tolist()
        by = "a signal" if signalled else f"the file {STOP_FILE}" if filed else ""
        return Asked(save=bool(by or late), by=by, busy=bool(writing))

    def saved(self, *, stopping: bool) -> None:
        """After a checkpoint; one that obeys, and is complete, removes the file."""
        self._saved = time.monotonic()
        if stopping and self._ranks.first:
            with optional(str(self._file)):
                self._file.unlink(missing_ok=True)

    def _notice(self, number: int, frame: object) -> None:
        self._seen = True
