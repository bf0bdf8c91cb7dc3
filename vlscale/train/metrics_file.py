"""metrics.jsonl: one JSON object a training step, on its way to the disk every step, never a step twice."""

import json
import math
import os
from pathlib import Path
from typing import Any

from vlscale.train.disk_faults import optional


class MetricsFile:
    """Opened by rank 0. `keep_until` drops the lines of later steps, and an incomplete last line: a resumed run makes
    them again."""

    def __init__(self, path: Path, keep_until: int):
        self.path = path
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= keep_until]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, values: dict[str, Any]) -> None:
        """JSON has no NaN: such values are written as strings, so that every line stays readable by any parser."""
        safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._waiting += (json.dumps(safe) + "\n").encode()
        self._write_on()

    def close(self) -> None:
        self._write_on()
        self._file.close()

    def _write_on(self) -> None:
        """A disk may be full for a while: what it does not take, even of a line, follows with the next one."""
        with optional(str(self.path)):
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]
