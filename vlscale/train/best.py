"""The best model so far by a measure of the evaluations: RUN/best/, as final/ is, with best.json beside the weights.

It is written under another name and renamed. Between the two renames of a replacement the one before waits as
`.best.before`, which the next start puts back.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from vlscale.distributed import Ranks
from vlscale.logging import get_logger
from vlscale.sections import TrainConfig
from vlscale.train.disk_faults import CannotWrite, stop, written_by_first

BEST = "best"


class Best:
    """`train.keep_best`: a name of eval.json's; a mean or median rank is best small, everything else large. Values of
    steps after `keep_until` are forgotten: a resumed run finds them again."""

    def __init__(self, folder: Path, train: TrainConfig, ranks: Ranks, keep_until: int):
        metric = train.keep_best
        self.folder, self.metric, self.ranks, self._disk_full = folder, metric, ranks, train.disk_full
        self._value: float | None = None
        if ranks.first:
            before = folder / f".{BEST}.before"
            if before.is_dir() and not (folder / BEST).is_dir():
                os.replace(before, folder / BEST)
            told = folder / BEST / "best.json"
            known = json.loads(told.read_text()) if told.is_file() else None
            if known is not None and known["metric"] == metric and known["step"] <= keep_until:
                self._value = known["value"]

    def consider(self, step: int, values: dict[str, float] | None, write: Callable[[Path], None]) -> None:
        """After an evaluation, whose measures rank 0 gives; `write(folder)` saves the model, or raises CannotWrite. On
        all ranks together."""
        name = self.metric
        if self.ranks.from_first(values is not None and name not in values):
            known = self.ranks.from_first(values and ", ".join(values))
            raise ValueError(f"train.keep_best={name}: no such measure; this evaluation has: {known}")
        if not self.ranks.from_first(values is not None and self._better(values[name])):
            return
        try:
            write(self.folder / f".{BEST}.new")
            with written_by_first(self.folder / BEST, self.ranks):
                if self.ranks.first:
                    self._replace(step, values[name])
        except CannotWrite as fault:
            shutil.rmtree(self.folder / f".{BEST}.new", ignore_errors=True)
            if self._disk_full == "stop":
                stop(f"{fault}; make room and continue with --resume, or set train.disk_full=continue", self.ranks)
            if self.ranks.first:
                get_logger().warning("%s; the best model before stays, training goes on", fault)

    def _replace(self, step: int, value: float) -> None:
        new, before = self.folder / f".{BEST}.new", self.folder / f".{BEST}.before"
        (new / "best.json").write_text(json.dumps({"metric": self.metric, "value": value, "step": step}))
        shutil.rmtree(before, ignore_errors=True)
        if (self.folder / BEST).is_dir():
            os.replace(self.folder / BEST, before)
        os.replace(new, self.folder / BEST)
        self._value = value
        shutil.rmtree(before, ignore_errors=True)
        get_logger().info("best %s so far, %.4g after step %d: %s", self.metric, value, step, self.folder / BEST)

    def _better(self, value: float) -> bool:
        if self._value is None:
            return True
        return value < self._value if self.metric.endswith("_rank") else value > self._value
