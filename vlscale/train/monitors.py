"""Curves for other tools: the run's numbers as CSV, for TensorBoard and for Weights & Biases, in its `monitors/`.

metrics.jsonl and eval.jsonl remain the record; this is a copy of their numbers under `train/...` and `eval/...`. As
there, steps that a resumed run makes again replace those of before (W&B keeps the first of two equal ones). Packages
are imported only when asked for.
"""

import csv
import importlib.util
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from vlscale.sections import LogConfig

FOLDER = "monitors"
Values = dict[str, Any]  # what is no finite number is left out


class Monitor(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def check_monitors(log: LogConfig) -> None:
    """Refuse a monitor whose package is missing, before anything is built."""
    for wanted, key, package in (
        (log.tensorboard, "log.tensorboard=true", "tensorboard"),
        (log.wandb != "none", f"log.wandb={log.wandb}", "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"{key} needs the package {package}, which is not installed: pip install {package}")


class Monitors:
    """All that `log` asks for, opened by rank 0. `name` is what a W&B page calls the run; `keep_until` is the step that
    the run continues after."""

    def __init__(self, log: LogConfig, folder: Path, name: str, keep_until: int):
        check_monitors(log)
        openers: list[tuple[bool, Callable[[Path], Monitor]]] = [
            (log.csv, lambda inside: _Csv(inside / "metrics.csv", keep_until)),
            (log.tensorboard, lambda inside: _TensorBoard(inside / "tensorboard", keep_until)),
            (log.wandb != "none", lambda inside: _Wandb(inside, log, name)),
        ]
        self._open: list[Monitor] = []
        for wanted, make in openers:
            if wanted:
                (folder / FOLDER).mkdir(parents=True, exist_ok=True)
                self._open.append(make(folder / FOLDER))

    def write(self, step: int, values: Values, kind: str = "train") -> None:
        """`kind` is train or eval; `values` is a line of metrics.jsonl or eval.jsonl."""
        if self._open:
            numbers = {f"{kind}/{name}": float(value) for name, value in values.items() if _is_number(name, value)}
            for monitor in self._open:
                monitor.write(step, numbers)

    def close(self) -> None:
        for monitor in self._open:
            monitor.close()


def _is_number(name: str, value: Any) -> bool:
    return name != "step" and isinstance(value, int | float) and math.isfinite(value)


class _Csv:
    """A number a line (step, name, value), for measures that not every step has."""

    def __init__(self, path: Path, keep_until: int):
        rows = []
        if path.is_file():
            with path.open(newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:] if len(row) == 3 and int(row[0]) <= keep_until]
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "name", "value"), *rows])
        os.replace(partial, path)
        self._file = path.open("a", newline="")

    def write(self, step: int, values: dict[str, float]) -> None:
        csv.writer(self._file).writerows((step, name, value) for name, value in values.items())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: Path, keep_until: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=keep_until + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One W&B run a run folder, whatever resumes there are: its id is kept beside it."""

    def __init__(self, folder: Path, log: LogConfig, name: str):
        import wandb

        kept = folder / "wandb-id"
        if not kept.is_file():
            kept.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=log.wandb_project,
            name=name,
            id=kept.read_text(),
            dir=str(folder),
            mode=log.wandb,
            resume="allow",
            reinit="create_new",  # stages and variants are runs of one process
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
