"""Never hang in silence: what takes too long is written down with its stacks, and a rank that is left alone ends.

A rank whose peers are gone or late gets an error from the collective that it waits in, at once where the connection
breaks, after `engine.timeout_seconds` at the latest: once two steps have been made, and outside of validation and
checkpoints, after the shorter `engine.warm_timeout_seconds`. It then says in one line where that was and, the lowest
of those that are left, which rank is gone (`last_words.py`, some seconds), and ends with exit code 1 without closing
anything, since the process group cannot be shut down any more.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.train.last_words import RollCall
from vlscale.train.stop import SIGNALS

WARM_AFTER = 2  # steps: the first ones compile, allocate and connect
_BACKENDS = ("gloo", "NCCL", "Connection closed by peer")


class Watchdog:
    """Entered around a run. `seconds`: how long a phase may take before it is reported, once; None: any time.

    `timeouts`: of collectives in general, and of those of warm steps."""

    def __init__(self, folder: Path, ranks: Ranks, seconds: float | None, timeouts: tuple[float, float] | None = None):
        self._file, self._ranks, self._seconds = folder / f"watchdog-rank-{ranks.rank}.txt", ranks, seconds
        self._timeouts, self._timeout, self._steps = timeouts, None, 0
        self._phase, self._since, self._reported = "start", time.monotonic(), False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def enter(self, phase: str, step: int) -> None:
        """From here on the run does this: data, step, validation or checkpoint."""
        self._phase, self._since, self._reported = f"{phase} of step {step}", time.monotonic(), False
        self._steps += phase == "step"
        if self._timeouts is not None and self._ranks.size > 1:
            long, short = self._timeouts
            wanted = short if self._steps > WARM_AFTER and phase in ("data", "step") else long
            if wanted != self._timeout:
                set_timeouts(wanted)
                self._timeout = wanted

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="vlscale-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._end_if_left_alone(error)

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """Around the steps, inside of what would be closed first: the others are waiting, and so is the launcher."""
        try:
            yield
        except Exception as error:
            self._end_if_left_alone(error)
            raise

    def _end_if_left_alone(self, error: BaseException | None) -> None:
        if self._ranks.size == 1 or error is None or not lost_a_rank(error):
            return
        self._ended.set()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # of a launcher that ends those that are left: first the last words
        said = str(error).splitlines()[0].partition(". ")[0]
        phase, _, step = self._phase.partition(" of ")
        where = step if phase == "step" else self._phase
        get_logger().error("%s", RollCall(self._ranks, timed_out=timed_out(error)).line(where, said))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            phase, taken = self._phase, time.monotonic() - self._since
            if taken > self._seconds and not self._reported:
                self._reported = True
                self._report(phase, taken)

    def _report(self, phase: str, taken: float) -> None:
        rank = self._ranks.rank
        get_logger().warning(
            "rank %d: %s takes longer than engine.step_timeout_seconds=%g; where it stands: %s",
            rank,
            phase,
            self._seconds,
            self._file,
        )
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank}: {phase}, {taken:.1f} s so far\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def set_timeouts(seconds: float) -> None:
    """Of all that is sent from here on, in every process group of this process: DeepSpeed has its own."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def lost_a_rank(error: BaseException) -> bool:
    """Whether a collective failed, not our own code."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _BACKENDS)
    )


def timed_out(error: BaseException) -> bool:
    """Whether a collective did, which closes the connections of its group. A wait in the store closes none."""
    if isinstance(error, dist.DistStoreError):
        return False
    return any(words in str(error).lower() for words in ("timed out", "timeout"))
