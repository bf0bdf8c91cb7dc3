"""Which rank the others wait for. All ranks leave the end of a step together, and meet again in the first collective of
the next one's losses: the time between is a rank's own, its data and its forward pass.

With ZeRO-3 ranks also meet to gather weights in between, which evens these times out: a slow rank is then seen later.
"""

import statistics
import time

import torch

from vlscale.distributed import Ranks
from vlscale.distributed.arrival import on_arrival
from vlscale.distributed.collectives import all_gather
from vlscale.logging import get_logger

SLOW = 1.5  # times the median of the others
SLACK = 0.01  # seconds that are never worth a word


class Stragglers:
    """Compared every `every` steps, by the medians over them; one number of each rank travels."""

    def __init__(self, ranks: Ranks, every: int):
        self._ranks, self._every = ranks, every
        self._own: list[float] = []
        self._start: float | torch.cuda.Event = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._told: set[int] = set()

    def begin(self) -> None:
        """Where a step begins."""
        if self._ranks.size > 1:
            self._start = self._now()
            on_arrival(self._arrive)

    def compare(self, step: int) -> dict[str, float]:
        """`slowest_rank` and `slowest_ratio` where there is one that all wait for; on all ranks together."""
        if self._ranks.size == 1 or step % self._every:
            return {}
        # At the end of a step the device has done all of it: its times are known.
        own = self._own + [start.elapsed_time(end) / 1000 for start, end in self._marks]
        self._own, self._marks = [], []
        mine = torch.tensor([statistics.median(own) if own else 0.0], device=self._ranks.device)
        return self._tell(step, all_gather(mine, self._ranks).tolist())

    def _tell(self, step: int, seconds: list[float]) -> dict[str, float]:
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        others = statistics.median(seconds[:slowest] + seconds[slowest + 1 :])
        ratio = seconds[slowest] / others if others > 0 else 1.0
        if ratio <= SLOW or seconds[slowest] - others < SLACK:
            return {}
        if self._ranks.first and slowest not in self._told:
            self._told.add(slowest)
            get_logger().warning(
                "step %d: rank %d is the slowest: %.3f s for its data and forward pass, %.1f times the median of the "
                "others; they wait for it. Said once; metrics.jsonl goes on to tell slowest_rank and slowest_ratio",
                step,
                slowest,
                seconds[slowest],
                ratio,
            )
        return {"slowest_rank": slowest, "slowest_ratio": round(ratio, 2)}

    def _arrive(self) -> None:
        now = self._now()
        if isinstance(now, float):
            self._own.append(now - self._start)
        else:
            self._marks.append((self._start, now))

    def _now(self) -> "float | torch.cuda.Event":
        """On a GPU a place in its queue of work: the host runs ahead of it, and is not made to wait."""
        if self._ranks.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
