"""Work beside training: a thread, what became of it, and how all ranks wait for it without a collective timing out."""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from vlscale.distributed import Ranks

LOOK = 0.2  # seconds between two looks of waiting ranks at each other


class Job:
    """Runs `work()` in a thread from now on. None is no work: it has ended. The process does not end before it, unless
    it is `abandoned` then."""

    def __init__(self, work: Callable[[], Any] | None, *, abandoned: bool = False):
        self.result: Any = None
        self.error: Exception | None = None
        self._work = work
        self._thread = None
        if work is not None:
            self._thread = threading.Thread(target=self._run, name="vlscale-background", daemon=abandoned)
            self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:
            self.error = error


def wait_for_all(job: Job, ranks: Ranks, seconds: float | None = None) -> bool:
    """Each rank with its own job, until every one has ended, or no more than so many seconds. However long that takes,
    each collective is short. Returns whether all have ended."""
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        job.join(LOOK)
        late = until is not None and time.monotonic() >= until
        own = torch.tensor([job.running, job.running and late], dtype=torch.int64, device=ranks.device)
        running, over = ranks.sum(own).tolist()
        if not running or over:
            return not running
