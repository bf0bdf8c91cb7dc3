"""Stopping on a signal: the step that runs is finished, a checkpoint is saved, the process ends with exit code 75."""

import signal
from types import TracebackType

import torch

from vlscale.distributed import Ranks

EXIT_CODE = 75  # EX_TEMPFAIL: the same command with --resume goes on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM and the cloud's preemption; `kill -USR1` by hand


class StoppedBySignal(SystemExit):
    """Ends the process with exit code 75, after the checkpoint is complete."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopWatch:
    """Notices signals while it is entered; any rank's signal stops all of them at the same step."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._seen = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopWatch":
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether a rank was asked to stop; called by all ranks together."""
        return int(self._ranks.sum(torch.tensor(int(self._seen), device=self._ranks.device))) > 0

    def _notice(self, number: int, frame: object) -> None:
        self._seen = True
