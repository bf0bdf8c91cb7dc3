"""What becomes of a step whose loss or gradient is not finite: `train.bad_numbers`.

Such a step is seen on all ranks before its update (`step.finish`), so that no weight and no moment ever holds it. Step
numbers count batches: a step without an update keeps its number, and the learning rate stays a function of it.

stop       end with exit code 1
skip       go on with the next batch
rollback   weights, moments and random states of the newest checkpoint, then the next batch: the updates since then are
           given up, their batches do not come again. A run that is resumed there ends the same way.

In every case `bad-STEP.json` in the run's folder names the samples.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.sections import TrainConfig
from vlscale.train.disk_faults import optional
from vlscale.train.drawn import Drawn


class BadNumbers(ArithmeticError):
    """Raised on all ranks together, before an update. `values` are the step's numbers."""

    def __init__(self, values: dict[str, float]):
        super().__init__("loss or gradient is not finite")
        self.values = values


class StoppedByBadNumbers(SystemExit):
    """Ends the process with exit code 1, after rank 0 has said why."""

    def __init__(self) -> None:
        super().__init__(1)


@dataclass
class BadSteps:
    """How many there were; a checkpoint keeps it."""

    skipped: int = 0
    in_a_row: int = 0


class Guard:
    """Takes steps. `forget` drops what the last backward left; `roll_back(step)` loads the newest checkpoint before
    that step and returns its own, or None where there is none."""

    def __init__(
        self,
        train: TrainConfig,
        folder: Path,
        ranks: Ranks,
        forget: Callable[[], None],
        roll_back: Callable[[int], int | None],
        seen: BadSteps,
    ):
        self.train, self.folder, self.ranks, self.seen = train, folder, ranks, seen
        self._forget, self._roll_back = forget, roll_back

    def take(self, step: int, drawn: Drawn, one: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The numbers of `one()`, the step on `drawn`; with `skipped_steps` where the policy goes on after bad ones."""
        try:
            values = one()
            self.seen.in_a_row = 0
        except BadNumbers as bad:
            values = bad.values
            self._after(step, drawn, values)
        return values if self.train.bad_numbers == "stop" else values | {"skipped_steps": self.seen.skipped}

    def _after(self, step: int, drawn: Drawn, values: dict[str, float]) -> None:
        policy, limit = self.train.bad_numbers, self.train.max_bad_steps
        bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value) and name != "grad_norm"]
        what = f"step {step}: {', '.join(bad) or 'the gradient is not finite'}"
        file = write_bad_step(self.folder, step, drawn, values, self.ranks)
        self._forget()
        if policy == "stop":
            self._stop(f"{what}; nothing was updated or saved, the samples are in {file}; look with `vlscale replay`, "
                       "lower optim.lr, or set train.bad_numbers=skip or rollback")  # fmt: skip
        self.seen.skipped += 1
        self.seen.in_a_row += 1
        if self.seen.in_a_row >= limit:
            self._stop(f"{what}; {limit} such steps in a row (train.max_bad_steps), the samples are in {file}")
        if policy == "skip":
            self._tell(f"{what}; skipped, the samples are in {file}")
            return
        back = self._roll_back(step)
        if back is None:
            self._stop(f"{what}; train.bad_numbers=rollback has no checkpoint to go back to yet; the samples are in "
                       f"{file}; set train.bad_numbers=skip, or a smaller train.checkpoint_every")  # fmt: skip
        self._tell(f"{what}; back to the weights of step {back}, on with the next batch; the samples are in {file}")

    def _tell(self, message: str) -> None:
        if self.ranks.first:
            get_logger().warning("%s", message)

    def _stop(self, message: str) -> None:
        if self.ranks.first:
            get_logger().error("%s", message)
        self.ranks.barrier()  # the launcher ends all ranks with the first
        raise StoppedByBadNumbers


def write_bad_step(folder: Path, step: int, drawn: Drawn, values: dict[str, float], ranks: Ranks) -> Path:
    """`bad-STEP.json`: the step's numbers and the keys of its samples, in order. On all ranks together."""
    keys = drawn.keys(ranks)
    file = folder / f"bad-{step}.json"
    if ranks.first:
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        partial = file.with_name(f".{file.name}.partial")
        with optional(str(file)):
            partial.write_text(json.dumps({"step": step, "values": numbers, "keys": keys}, indent=1))
            os.replace(partial, file)
    return file
