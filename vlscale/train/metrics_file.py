"""metrics.jsonl: one JSON object a training step, flushed every step, never a step twice."""

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsFile:
    """Opened by rank 0. `keep_until` drops the lines of later steps, and an incomplete last line: a resumed run makes
    them again."""

    def __init__(self, path: Path, keep_until: int):
        self.path = path
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= keep_until]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
        self._file = path.open("a")

    def write(self, values: dict[str, Any]) -> None:
        """JSON has no NaN: such values are written as strings, so that every line stays readable by any parser."""
        safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps(safe) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]
